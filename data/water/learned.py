"""Preliminary potentials: trained on the frames there are, they run the dynamics whose frames the reference labels."""

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sampling import check_bonds

from equimd.calculators.ase import EquimdCalculator
from equimd.md import iterate_md, run_md
from equimd.md.settings import MDSettings, make_settings
from equimd.training import make_recipe, train

FRICTION_PER_FS = 0.02
LOOK_FS = 20.0  # how often a trajectory is looked at
CONTACTS = {1: 1.2, 8: 2.2}  # Å; closer than any two in the classical frames
MAX_FORCE = 15.0  # eV/Å; a trajectory stops beyond it
RECIPE = {
    "seed": 0,
    "model": {"family": "equivariant", "cutoff": 4.0, "n_layers": 2, "l_max": 1, "n_channels": 16},
    "loss": {"kind": "mse", "energy": 10.0, "forces": 1.0, "stress": 10.0},
    "optimizer": {"name": "adamw", "lr": 5e-3},
    "schedule": {"warmup_steps": 50},
    "ema": {"decay": 0.99},
    "batch": {"n_frames": 1},
    "validation": {"symmetry_frames": 0, "every": 2},
    "n_threads": 1,
}


@dataclass(frozen=True)
class Walk:
    """One trajectory of Langevin dynamics: `burn_in_fs` discarded, then a frame every `interval_fs`."""

    seed: int
    temperature_K: float
    frames: int
    burn_in_fs: float = 200.0
    interval_fs: float = 100.0
    timestep_fs: float = 1.0
    keep_last: bool = False


def trained(folder: Path, train_frames: Sequence[Atoms], valid_frames: Sequence[Atoms], steps: int, data: dict) -> Path:
    """The weights of a potential trained on these frames in `folder`, from scratch; an interrupted one goes on."""
    if not (folder / "result.json").exists():
        files = {"train": f"{folder.name}-train.xyz", "valid": f"{folder.name}-valid.xyz"}
        for split, frames in (("train", train_frames), ("valid", valid_frames)):
            write(folder.with_name(files[split]), list(frames), format="extxyz")
        values = {**RECIPE, "name": f"water-{folder.name}", "data": {**files, **data}, "steps": steps}
        result = train(make_recipe(values, folder.parent), folder, resume=folder.exists(), progress=False)
        errors = result.valid
        print(f"{folder.name}: {len(train_frames)} frames, {steps} steps, force RMSE {errors.force_rmse:.4f} eV/Å")
    return folder / "model.safetensors"


def settings(walk: Walk, steps: int, stride_fs: float) -> MDSettings:
    """Langevin dynamics that stops when it explodes."""
    return make_settings(
        ensemble="nvt",
        steps=steps,
        timestep_fs=walk.timestep_fs,
        temperature_K=walk.temperature_K,
        friction_per_fs=FRICTION_PER_FS,
        stride=round(stride_fs / walk.timestep_fs),
        seed=walk.seed,
        max_temperature_K=1500.0,
        max_force=MAX_FORCE,
    )


def calculator(model: Path) -> EquimdCalculator:
    """The potential on the CPU, one thread."""
    import torch

    torch.set_num_threads(1)
    return EquimdCalculator(model, device="cpu", self_check=False)


def walked(start: Atoms, walk: Walk, model: Path) -> list[Atoms]:
    """Bare frames of a trajectory; fewer than asked for if it explodes or a molecule breaks.

    With `keep_last` the last frame before that, at most `LOOK_FS` old, is one of them: there the potential is wrong.
    """
    frames: list[Atoms] = []
    last, age = None, 0.0
    steps = round((walk.burn_in_fs + walk.frames * walk.interval_fs) / walk.timestep_fs)
    try:
        for step, frame in iterate_md(start, calculator(model), settings(walk, steps, LOOK_FS)):
            check_bonds(start, [frame])
            if not walk.keep_last:
                check_contacts(frame)
            last, age = bare(frame), step * walk.timestep_fs - walk.burn_in_fs
            if age > 0 and age % walk.interval_fs == 0:
                frames.append(last)
    except RuntimeError as error:
        print(f"walk {walk.seed} stopped after {len(frames)} of {walk.frames} frames: {error}", flush=True)
        if walk.keep_last and last is not None and last not in frames:
            frames.append(last)
    return frames


def check_contacts(frame: Atoms) -> None:
    """Refuse molecules that a potential let come closer than the reference does.

    Raises:
        RuntimeError: if atoms of one element in two molecules are closer than `CONTACTS`.
    """
    distances = frame.get_all_distances(mic=True)
    molecule = np.arange(len(frame)) // 3
    distances[molecule[:, None] == molecule] = np.inf
    for number, closest in CONTACTS.items():
        chosen = frame.numbers == number
        found = distances[np.ix_(chosen, chosen)].min()
        if found < closest:
            raise RuntimeError(f"two atoms {number} of different molecules are {found:.2f} Å apart")


def walks(starts: Sequence[Atoms], plan: Sequence[Walk], model: Path, processes: int) -> list[list[Atoms]]:
    """The trajectories of a plan, in order, each from its own start, in worker processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(plan)), mp_context=context) as pool:
        return list(pool.map(walked, starts, plan, [model] * len(plan)))


def bare(frame: Atoms) -> Atoms:
    """Elements, positions and cell, nothing else."""
    return Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)


def long_run(start: Atoms, walk: Walk, model: Path, path: Path) -> tuple[list[Atoms], dict]:
    """Frames of one long trajectory, the start left out, and how it went; an interrupted one goes on."""
    steps = round(walk.frames * walk.interval_fs / walk.timestep_fs)
    resume = path.with_name(path.name + ".state.json").exists()
    result = run_md(start, calculator(model), settings(walk, steps, walk.interval_fs), path, resume=resume)
    frames = list(read(path, "1:"))
    check_bonds(start, frames)
    facts = {
        "length_ps": result.time_ps,
        "timestep_fs": walk.timestep_fs,
        "temperature_K": walk.temperature_K,
        "mean_temperature_K": round(float(np.mean([frame.get_temperature() for frame in frames])), 1),
        "stopped": result.stopped,
    }
    return [bare(frame) for frame in frames], facts


def force_rmse(model: Path, frames: Sequence[Atoms]) -> float:
    """Root mean square of the difference of force components between the potential and the labels, in eV/Å."""
    forces = calculator(model).evaluate(list(frames)).forces
    return float(np.sqrt(np.mean([(f - frame.get_forces()) ** 2 for f, frame in zip(forces, frames, strict=True)])))
