"""Passes, memory, signals and disks: what may come in the way of a training, and that nothing is lost by it."""

import errno
import gc
import os
import platform
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from safetensors.torch import load_file
from training_samples import TINY

from equimd.errors import FailedError, InputError
from equimd.graph import AtomGraph
from equimd.models.potential import Potential
from equimd.training import loop, train
from equimd.training.distributed import StoppedError
from equimd.training.memory import OutOfMemoryError, advising, keep_freed_memory
from equimd.training.objective import Objective
from equimd.training.recipe import make_recipe
from equimd.training.validation import Errors


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(run / "state.safetensors")
    return {key: value for key, value in state.items() if key.startswith(("weights/", "average/"))}


def difference(a: Path, b: Path) -> float:
    one, other = weights(a), weights(b)
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.fixture
def patchy(folder):
    """The same folder, where a third of the frames have no forces: passes have different numbers of labels."""
    frames = read(folder / "train.xyz", ":")
    for atoms in frames[::3]:
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy())
    write(folder / "train.xyz", frames, format="extxyz")
    return folder


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_passes_add_up_to_the_batch(patchy, values, family, monkeypatch):
    values |= {"model": TINY[family], "augmentation": {"rotate": True, "copies": 2}}
    passes = []
    original = loop._Training.add_gradient

    def counted(self, part, *rest):
        passes.append(part.usual.n_edges)
        return original(self, part, *rest)

    monkeypatch.setattr(loop._Training, "add_gradient", counted)
    train(make_recipe(values, patchy), patchy / "whole", progress=False)
    assert len(passes) == 10
    values["batch"] = {"n_frames": 6, "max_edges_per_pass": 70}
    train(make_recipe(values, patchy), patchy / "passes", progress=False)
    assert len(passes) > 40
    assert max(passes[10:]) <= 70
    assert difference(patchy / "whole", patchy / "passes") < 1e-10  # sums in another order, in float64
    # The mean of the passes' means is something else.
    quarter = lambda self, part, fraction, shares: original(self, part, fraction, torch.full_like(shares, 0.25))  # noqa: E731
    monkeypatch.setattr(loop._Training, "add_gradient", quarter)
    train(make_recipe(values, patchy), patchy / "wrong", progress=False)
    assert difference(patchy / "whole", patchy / "wrong") > 1e-4


def test_passes_add_up_with_denoising_and_stress(folder, values, monkeypatch):
    rng, frames = np.random.default_rng(0), read(folder / "train.xyz", ":")
    for k, atoms in enumerate(frames):
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.set_cell(8.0 * np.eye(3))
        atoms.pbc = True
        if k % 3:  # passes have different numbers of them
            labels["stress"] = rng.normal(0, 0.02, 6)
        if k % 4 == 0:
            del labels["energy"]
        atoms.calc = SinglePointCalculator(atoms, **labels)
    write(folder / "train.xyz", frames, format="extxyz")
    values |= {"loss": {"stress": 1.0}, "denoising": {"per": "frame", "probability": 0.5, "energy": 0.5}}
    train(make_recipe(values, folder), folder / "whole", progress=False)
    values["batch"] = {"n_frames": 6, "max_edges_per_pass": 70}
    recipe, original = make_recipe(values, folder), loop._Training.add_gradient
    train(recipe, folder / "passes", progress=False)
    assert difference(folder / "whole", folder / "passes") < 1e-10  # sums in another order, in float64
    for term in range(5):  # energies, forces, stress, noise, energies of what is denoised

        def wrong(self, part, fraction, shares, term=term):
            return original(self, part, fraction, shares.index_fill(0, torch.tensor([term]), 1.0))

        monkeypatch.setattr(loop._Training, "add_gradient", wrong)
        train(recipe, folder / f"wrong-{term}", progress=False)
        assert difference(folder / "whole", folder / f"wrong-{term}") > 1e-6


def test_out_of_memory_in_a_step_keeps_the_run(folder, values, monkeypatch):
    train(make_recipe(values, folder), folder / "whole", progress=False)
    original = Potential.predict_trainable
    room = 60  # edges

    def predict(self, graph, **options):
        if graph.n_edges > room:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return original(self, graph, **options)

    monkeypatch.setattr(Potential, "predict_trainable", predict)
    with pytest.raises(OutOfMemoryError) as caught:
        train(make_recipe(values, folder), folder / "run", progress=False)
    said = str(caught.value)
    assert "\n" not in said
    assert "for 6 frames with" in said
    assert "--resume" in said
    advised = int(said.partition("--set batch.max_edges_per_pass=")[2].partition(")")[0])
    assert advised <= room
    values["batch"] = {"n_frames": 6, "max_edges_per_pass": advised}
    result = train(make_recipe(values, folder), folder / "run", resume=True, progress=False)
    assert result.stopped == "finished"
    assert difference(folder / "whole", folder / "run") < 1e-10
    with pytest.raises(InputError, match=r"recipe.batch.n_frames was 6 and is now 3"):
        train(make_recipe({**values, "batch": {"n_frames": 3}}, folder), folder / "run", resume=True, progress=False)


def test_out_of_memory_in_a_validation_keeps_the_run(folder, values, monkeypatch):
    train(make_recipe(values, folder), folder / "whole", progress=False)
    original = Potential.forward

    def forward(self, graph, **options):
        if graph.n_systems > 3 and not options.get("create_graph"):
            raise MemoryError
        return original(self, graph, **options)

    values["validation"]["symmetry_frames"] = 6
    monkeypatch.setattr(Potential, "forward", forward)
    with pytest.raises(OutOfMemoryError, match=r"in a validation, for 6 frames .*--set validation.max_edges=(\d+)\)"):
        train(make_recipe(values, folder), folder / "run", progress=False)
    values["validation"]["max_edges"] = 60
    train(make_recipe(values, folder), folder / "run", resume=True, progress=False)
    assert difference(folder / "whole", folder / "run") == 0.0


def test_advice_for_what_cannot_be_divided():
    graph = AtomGraph(positions=torch.zeros(3, 3), edge_index=torch.zeros(2, 6))
    graph.n_systems = 1
    with pytest.raises(OutOfMemoryError, match="a single frame cannot be divided"), advising("x", "here", graph):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with pytest.raises(RuntimeError, match="another fault"), advising("x", "here", graph):
        raise RuntimeError("another fault")


def test_advice_counts_what_is_denoised(folder, values, monkeypatch):
    def predict(*_):
        raise MemoryError

    monkeypatch.setattr(Objective, "_denoise", predict)
    values |= {"denoising": {"probability": 0.98}, "steps": 40}  # whole batches
    with pytest.raises(OutOfMemoryError, match=r"for 6 frames with .*--set batch.max_edges_per_pass=(\d+)\)") as caught:
        train(make_recipe(values, folder), folder / "run", progress=False)
    assert int(str(caught.value).partition("max_edges_per_pass=")[2].partition(")")[0]) > 10


@pytest.mark.parametrize("part", ["symmetry", "precision"])
def test_out_of_memory_beside_the_errors_keeps_the_run(folder, values, monkeypatch, part):
    values["validation"]["symmetry_frames"] = 6
    place, name, where = {
        "symmetry": (Potential, "forward", "in a validation's record of the symmetry"),
        "precision": (Potential, "predict_trainable", "in the check of the precision"),
    }[part]
    if part == "precision":
        values |= {"dtype": "float32", "precision": "bf16"}
    else:
        monkeypatch.setattr(loop, "evaluate", lambda *_: Errors(n_frames=6, force_mae=1.0))
    recipe, original = make_recipe(values, folder), getattr(place, name)
    train(recipe, folder / "whole", progress=False)
    steps = []

    def limited(self, graph, **options):
        if graph.n_edges > 60 and not (steps if part == "precision" else options.get("create_graph")):
            raise MemoryError
        return original(self, graph, **options)

    def step(self, epoch):
        steps.append(epoch)
        one_step(self, epoch)

    one_step = loop._Training.step
    monkeypatch.setattr(loop._Training, "step", step)
    monkeypatch.setattr(place, name, limited)
    with pytest.raises(OutOfMemoryError, match=rf"{where}, for .*--set validation.max_edges=(\d+)\)"):
        train(recipe, folder / "run", progress=False)
    assert (folder / "run" / "state.safetensors").exists()
    values["validation"] |= {"max_edges": 60, "symmetry_frames": 5}
    train(make_recipe(values, folder), folder / "run", resume=True, progress=False)
    assert difference(folder / "whole", folder / "run") == 0.0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_and_writes_the_state(folder, values, monkeypatch, name):
    recipe = make_recipe(values, folder)
    train(recipe, folder / "whole", progress=False)
    original, number = loop._Training.step, getattr(signal, name)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def step(self, epoch):
        original(self, epoch)
        if self.progress.step == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", step)
        with pytest.raises(StoppedError, match=f"stopped by {name} after step 5; the state is written, continue with"):
            train(recipe, folder / "run", progress=False)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(recipe, folder / "run", resume=True, progress=False)
    assert difference(folder / "whole", folder / "run") == 0.0


def test_a_full_disk_loses_nothing_whichever_file_finds_it_full(folder, values, monkeypatch):
    values |= {"steps": 6, "checkpoint": {"steps": 2, "minutes": None}}
    recipe = make_recipe(values, folder)
    fsync, synced = os.fsync, []

    def count(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}") if os.path.isdir("/proc/self/fd") else "")
        if len(synced) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", count)
    full_at = 0
    train(recipe, folder / "whole", progress=False)
    n_writes = len(synced)
    assert n_writes >= 10
    for full_at in range(1, n_writes + 1):  # noqa: B007 (count reads it)
        run = folder / f"run-{full_at}"
        synced.clear()
        with pytest.raises(
            FailedError, match=rf"no space left on the disk while writing .*run-{full_at}/\w+\.\w+; what"
        ):
            train(recipe, run, progress=False)
        assert not list(run.glob("*.tmp"))
        train(recipe, run, resume=True, progress=False)
        assert difference(folder / "whole", run) == 0.0
        assert len((run / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_where_glibc_can():
    # In a process of its own, as the setting stays.
    code = "import sys; from equimd.training.memory import keep_freed_memory; sys.exit(keep_freed_memory() is not True)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_set_without_glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


def growth(folder: Path, recipe, monkeypatch, leak: list | None = None) -> int:
    """Bytes of Python's memory that a training gains between a third of its steps and the last."""
    original, sizes = loop._Training.step, []

    def step(self, epoch):
        original(self, epoch)
        if leak is not None:
            leak.append(self.batches.passes(epoch, 0))
        if self.progress.step in (recipe.steps // 3, recipe.steps):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", step)
        tracemalloc.start()
        try:
            train(recipe, folder / f"run-{recipe.steps}", progress=False)
        finally:
            tracemalloc.stop()
    return sizes[1] - sizes[0]


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_memory_is_flat_over_epochs(folder, values, family, monkeypatch):
    values |= {"model": TINY[family], "batch": {"n_frames": 24}, "data": values["data"] | {"n_train": 4}}
    values["validation"] |= {"every": 10}
    # 133 epochs of one step. What the graph of one takes in Python alone is 3 kB, 400 kB together, a prediction that
    # is held far more; records, caches and messages of pytest take some 40 kB.
    assert growth(folder, make_recipe(values | {"steps": 200}, folder), monkeypatch) < 100_000
    assert growth(folder, make_recipe(values | {"steps": 30}, folder), monkeypatch, leak=[]) > 50_000
