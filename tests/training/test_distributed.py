"""Two processes do what one does; whatever ends one of them ends both, and the state is whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from safetensors.torch import load_file
from training_samples import E0, TINY, spring_frames, steps_of

import equimd
from equimd.errors import InputError
from equimd.training import distributed, lifeline, loop, train
from equimd.training.distributed import StoppedError, World, find_place
from equimd.training.sharding import balanced_parts, contiguous_part, passes

HERE = Path(__file__).parent
# A pair of processes is started three times only, since each loads torch; stated here so that nothing waits for ever.
SECONDS = 280


def test_a_process_does_not_outlive_another_by_half_a_minute():
    """The most that it waits; ``benchmarks/distributed.py`` measures what it takes."""
    assert lifeline.GRACE_SECONDS + distributed._SECONDS_TO_TELL < 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    environment |= {"PYTHONPATH": str(Path(equimd.__file__).parents[1]), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning:equimd", *command],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    )


def make_recipe_values(family: str, **changes) -> dict:
    return {
        "name": "pair",
        "seed": 3,
        "model": dict(TINY[family]),
        "data": {"train": "../train.xyz", "valid": "../valid.xyz", "isolated_atom_energies": dict(E0)},
        "batch": {"n_frames": 5},
        "schedule": {"warmup_steps": 2},
        "augmentation": {"rotate": True, "copies": 2},
        "validation": {"symmetry_frames": 3, "n_rotations": 2},
        "steps": 20,
        "dtype": "float64",
        "device": "cpu",
        "n_threads": 1,
        **changes,
    }


RECIPES = {
    "equivariant": make_recipe_values("equivariant"),
    "transformer": make_recipe_values("transformer"),
    "wrong": make_recipe_values("transformer"),
    "float32": make_recipe_values("transformer", dtype="float32"),
    # One frame in a batch: one of the processes has none.
    "lonely": make_recipe_values("transformer", batch={"n_frames": 1}, optimizer={"name": "muon"}),
    "signalled": make_recipe_values("transformer"),
    "memory": make_recipe_values("transformer"),
    "diverging": make_recipe_values("transformer"),
    "out_of_step": make_recipe_values("transformer"),
    "zz_bad": make_recipe_values("transformer", data=make_recipe_values("transformer")["data"] | {"valid": "gone.xyz"}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder where two processes have trained all recipes together; what each of them says came of it."""
    folder = tmp_path_factory.mktemp("pair")
    frames = spring_frames(24, 1)
    for k in range(0, 24, 3):  # labels that are missing here and there: processes have different numbers of them
        frames[k].calc = SinglePointCalculator(frames[k], energy=frames[k].get_potential_energy())
    write(folder / "train.xyz", frames, format="extxyz")
    write(folder / "valid.xyz", spring_frames(6, 2), format="extxyz")
    (folder / "jobs").mkdir()
    for name, values in RECIPES.items():
        (folder / "jobs" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [str(HERE / "two_processes.py"), str(folder / "jobs")]
    both = [start(command, shared | {"RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(2)]
    errors = [process.communicate(timeout=SECONDS)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    return folder / "jobs", [json.loads((folder / "jobs" / f"outcome-{k}.json").read_text()) for k in range(2)]


def difference(a: Path, b: Path) -> float:
    """Largest difference of weights and of their average."""
    one, other = (load_file(folder / "state.safetensors") for folder in (a, b))
    return max(float((one[k] - other[k]).abs().max()) for k in one if k.startswith(("weights/", "average/")))


@pytest.mark.parametrize("name", ["equivariant", "transformer", "lonely", "float32"])
def test_two_processes_do_what_one_does(pair, name, tmp_path):
    folder, outcomes = pair
    assert [outcome[name] for outcome in outcomes] == ["finished", "finished"]
    alone = train(folder / f"{name}.yaml", tmp_path / "alone", progress=False)
    # float64: sums in another order, over 20 steps. float32: Adam may turn a gradient of rounding into a step.
    assert difference(folder / name, tmp_path / "alone") < (1e-3 if name == "float32" else 1e-10)
    result = json.loads((folder / name / "result.json").read_text())
    assert result["n_devices"] == 2
    assert result["device_hours"] == pytest.approx(2 * result["hours"], rel=1e-3)
    tolerance = 1e-3 if name == "float32" else 1e-9
    for key in ("force_mae", "force_rmse", "energy_mae", "energy_per_atom_rmse"):
        assert result["valid"][key] == pytest.approx(getattr(alone.valid, key), rel=tolerance)
    assert alone.symmetry is not None
    assert result["symmetry"]["l_mean"] == pytest.approx(alone.symmetry.l_mean, rel=tolerance)
    columns = [line.split(",")[:11] for line in (folder / name / "metrics.csv").read_text().splitlines()]
    alone_columns = [line.split(",")[:11] for line in (tmp_path / "alone" / "metrics.csv").read_text().splitlines()]
    if name != "float32":
        for row, expected in zip(columns[1:], alone_columns[1:], strict=True):
            assert [float(x or 0) for x in row] == pytest.approx([float(x or 0) for x in expected], rel=1e-5)


def test_means_over_the_labels_of_each_process_would_not_do(pair, tmp_path):
    folder, outcomes = pair
    assert outcomes[0]["wrong"] == "finished"
    assert difference(folder / "wrong", folder / "transformer") > 1e-4


def test_a_signal_to_one_process_stops_both_and_one_process_continues(pair):
    folder, outcomes = pair
    assert outcomes[0]["signalled"].startswith("StoppedError: stopped by a signal to another process after step 7; the")
    assert outcomes[1]["signalled"].startswith("ReportedElsewhere")
    train(folder / "signalled.yaml", folder / "signalled", resume=True, progress=False)
    assert difference(folder / "signalled", folder / "transformer") < 1e-10


def test_what_fails_on_one_process_ends_both_with_one_message(pair):
    folder, outcomes = pair
    assert outcomes[0]["memory"].startswith("ReportedElsewhere")
    assert outcomes[1]["memory"].startswith("OutOfMemoryError: out of memory here, for ")
    train(folder / "memory.yaml", folder / "memory", resume=True, progress=False)
    assert difference(folder / "memory", folder / "transformer") < 1e-10
    assert outcomes[0]["diverging"].startswith("TrainingDivergedError: the gradient is nan at step 7")
    assert outcomes[1]["diverging"].startswith("ReportedElsewhere")
    assert outcomes[0]["out_of_step"].startswith("FailedError: the processes hold different weights at step 5")
    assert "gone.xyz" in outcomes[0]["zz_bad"]
    assert outcomes[1]["zz_bad"].startswith("ReportedElsewhere")
    assert not (folder / "zz_bad").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_run_and_one_process_continues(pair, tmp_path, monkeypatch, killed):
    """Started as srun does, by variables of SLURM, without an agent that would kill the other."""
    folder, _ = pair
    values = RECIPES["transformer"] | {"steps": 100_000, "checkpoint": {"steps": 20}}
    (folder.parent / "killed").mkdir(exist_ok=True)
    recipe = folder.parent / "killed" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    shared = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "77", "MASTER_PORT": str(free_port())}
    command = ["-m", "equimd", "train", str(recipe), "-o", str(tmp_path / "run")]
    both = [start(command, shared | {"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)}) for k in range(2)]
    deadline = time.monotonic() + SECONDS
    while steps_of(tmp_path / "run") < 20 and time.monotonic() < deadline:
        assert both[0].poll() is None
        time.sleep(0.05)
    other = both[1 - killed]
    both[killed].send_signal(signal.SIGKILL)
    both[killed].wait()
    said = other.communicate(timeout=SECONDS)[1]
    both[killed].communicate()
    assert other.returncode == 1
    assert said.splitlines()[-1] == (
        "equimd: error: another process of this training is gone; continue with --resume, on as many processes as you"
        " like"
    )
    stepped = steps_of(tmp_path / "run")
    steps = []

    def step(self, epoch):
        steps.append(self.progress.step)
        self.world.signal = "SIGTERM" if len(steps) == 3 else None
        original(self, epoch)

    original = loop._Training.step
    monkeypatch.setattr(loop._Training, "step", step)
    with pytest.raises(StoppedError, match=f"stopped by SIGTERM after step {stepped + 2}; the state is written"):
        train(recipe, tmp_path / "run", resume=True, progress=False)
    assert stepped >= 20
    assert steps == [stepped, stepped + 1, stepped + 2]


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "1234"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4000017"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4000017"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, "127.0.0.1")),
        ({"RANK": "0"}, (0, 1, 0, "127.0.0.1")),
        (TORCHRUN, (3, 8, 1, "node7")),
        (TORCHRUN | SLURM, (3, 8, 1, "node7")),
        (SLURM | {"SLURM_NODELIST": "gpu[003-006,9],login1"}, (5, 8, 1, "gpu003")),
        (SLURM | {"SLURM_NODELIST": "gpu[12,14]-ib"}, (5, 8, 1, "gpu12-ib")),
        (SLURM | {"SLURM_NODELIST": "a-1,b-2"}, (5, 8, 1, "a-1")),
        (SLURM | {"SLURM_NODELIST": "a,b", "SLURM_STEP_NODELIST": "b"}, (5, 8, 1, "b")),
        (SLURM | {"SLURM_NODELIST": "a", "SLURM_NNODES": "1"}, (5, 8, 1, "127.0.0.1")),
        (SLURM | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"}, (5, 8, 1, "10.0.0.3")),
        (SLURM | {"SLURM_NODELIST": "a", "MASTER_ADDR": "c"}, (5, 8, 1, "c")),
        (BATCH_SCRIPT | {"SLURM_NODELIST": "gpu[003-006]"}, (0, 1, 0, "127.0.0.1")),
        # A shell of an allocation for eight tasks is no task of them.
        (SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 1, "127.0.0.1")),
    ],
)
def test_the_environment_says_who_we_are(variables, expected):
    place = find_place(variables)
    assert (place.rank, place.size, place.local_rank, place.host) == expected
    if "SLURM_STEP_NUM_TASKS" in variables and "RANK" not in variables:
        assert place.port == 20_017


def test_steps_of_a_job_have_ports_of_their_own():
    assert find_place(SLURM | {"SLURM_STEP_ID": "0"}).port == 20_017
    assert find_place(SLURM | {"SLURM_STEP_ID": "3"}).port == 23_044


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN | {"RANK": "x"}, "the environment variable RANK is 'x'; accepted is an integer"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8 of WORLD_SIZE 8; accepted is 0 to 7"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "5"}, "SLURM_PROCID is 5 of SLURM_STEP_NUM_TASKS 5"),
    ],
)
def test_an_environment_that_makes_no_sense(variables, said):
    with pytest.raises(InputError, match=said):
        find_place(variables)


def test_devices():
    with pytest.raises(InputError, match="device is 'gpu'; accepted are"):
        World().use_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            World().use_device("cuda")


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
def test_parts_of_a_batch_are_balanced_and_cover_it(n_parts):
    sizes = np.random.default_rng(0).integers(10, 200, 64)
    parts = balanced_parts(sizes, n_parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(64))
    loads = [sizes[part].sum() for part in parts]
    assert max(loads) - min(loads) <= sizes.min()  # 64 frames are many: what is left over is less than a small one
    assert [len(part) for part in balanced_parts(np.array([5, 0]), 3)] == [1, 1, 0]
    assert all(np.array_equal(a, b) for a, b in zip(parts, balanced_parts(sizes.copy(), n_parts), strict=True))


def test_passes_and_ranges():
    sizes = np.array([4, 4, 9, 1, 2, 3])
    assert [part.tolist() for part in passes(sizes, 8)] == [[0, 1], [2], [3, 4, 5]]
    assert [part.tolist() for part in passes(sizes, None)] == [[0, 1, 2, 3, 4, 5]]
    assert passes(sizes[:0], 8) == []
    start = np.concatenate([[0], np.cumsum(sizes)])
    for n_parts in (1, 2, 3, 9):
        ranges = [contiguous_part(start, part, n_parts) for part in range(n_parts)]
        assert [k for first, last in ranges for k in range(first, last)] == list(range(6))
    assert contiguous_part(start, 0, 2) == (0, 3)
    no_edges = [contiguous_part(np.zeros(4, dtype=int), part, 2) for part in range(2)]
    assert [k for first, last in no_edges for k in range(first, last)] == [0, 1, 2]
