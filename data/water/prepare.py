"""Make the water data set: GFN1-xTB energies, forces and stresses of a periodic box of 32 molecules.

`python data/water/prepare.py` makes every file of this folder but the README. Stages: frames of a classical model;
then, twice, a preliminary potential is trained on what there is, molecular dynamics is run with it, and the reference
labels frames of that. A third, trained on all of train, runs the trajectories of valid, test and hot, and a longer one,
on which its errors tell whether dynamics stays where it was trained.
Each stage leaves its result in the cache folder, so that interrupted work resumes, on another machine if need be.
"""

import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.io import read, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classical import LENGTH, ClassicalRun, rattled, sample
from learned import FRICTION_PER_FS, RECIPE, Walk, bare, force_rmse, long_run, trained, walks
from sampling import arguments, describe, save

from equimd.references import isolated_atom_energies, label

HERE = Path(__file__).resolve().parent
REFERENCE = "gfn1-xtb"
CHUNK = 32
MAX_FORCE = 12.0  # eV/Å; strongly rattled classical frames beyond it are left out

CLASSICAL = {
    "train": [ClassicalRun(100 + k, (300.0, 400.0, 500.0, 350.0)[k % 4], frames=25) for k in range(8)],
    "valid": [ClassicalRun(200 + k, (300.0, 450.0)[k], frames=25) for k in range(2)],
}
STEPS = (1500, 1000, 1500)  # of the trainings
HELD_OUT = 8  # frames of each round that choose the weights of the next potential instead of training it
ROUNDS = {
    1: [Walk(1000 + k, (300.0, 450.0)[k % 2], frames=2, burn_in_fs=40.0, keep_last=True) for k in range(28)],
    2: [Walk(2000 + k, (300.0, 450.0, 350.0)[k % 3], frames=8, burn_in_fs=100.0, keep_last=True) for k in range(12)],
}
SPLITS = {  # the start of seed 3002 is rattled too much for a trajectory
    "valid": [Walk(seed, (300.0, 450.0)[seed % 2], frames=10) for seed in (3000, 3001, 3003, 3004)],
    "test": [Walk(4000 + k, (300.0, 375.0, 450.0)[k % 3], frames=10) for k in range(6)],
    "hot": [Walk(5000 + k, 600.0, frames=10) for k in range(4)],
}
CHECK = Walk(6000, 300.0, frames=20, interval_fs=250.0, timestep_fs=0.5)


def classical_frames(split: str, cache: Path, processes: int) -> list[Atoms]:
    """Labelled, partly rattled frames of the classical model."""
    path = cache / f"classical-{split}.xyz"
    if not path.exists():
        runs = CLASSICAL[split]
        frames = [frame for run in runs for frame in rattled(sample(run), run.seed)]
        save_frames(path, shuffled(frames, seed=runs[0].seed))
    return labelled(path, processes)


def save_frames(path: Path, frames: list[Atoms]) -> None:
    """Write frames with whole molecules in the cell, in 8 decimals: what is labelled is what will be stored."""
    for frame in frames:
        oxygens = frame.positions[::3]
        frame.positions -= np.repeat(LENGTH * np.floor(oxygens / LENGTH), 3, axis=0)
    partial = path.with_suffix(".part")
    write(partial, frames, format="extxyz")
    partial.rename(path)


def shuffled(frames: list[Atoms], seed: int) -> list[Atoms]:
    """The frames in random order, so that any first part of them is representative."""
    return [frames[k] for k in np.random.default_rng(seed).permutation(len(frames))]


def labelled(path: Path, processes: int) -> list[Atoms]:
    """The frames of a file with labels, which are kept beside it in chunks."""
    frames: list[Atoms] = list(read(path, ":"))
    done: list[Atoms] = []
    for first in range(0, len(frames), CHUNK):
        chunk = path.with_name(f"{path.stem}-labels-{first:04d}.xyz")
        if not chunk.exists():
            partial = chunk.with_suffix(".part")
            write(partial, label(frames[first : first + CHUNK], REFERENCE, processes=processes), format="extxyz")
            partial.rename(chunk)
            print(f"{path.stem}: {min(first + CHUNK, len(frames))} of {len(frames)} labelled", flush=True)
        done += read(chunk, ":")
    if any(abs(a.positions - b.positions).max() > 1e-7 for a, b in zip(frames, done, strict=True)):
        raise RuntimeError(f"labels beside {path} belong to other frames; remove them")
    return done


def gentle(frames: list[Atoms]) -> list[Atoms]:
    """Those without a huge force."""
    return [frame for frame in frames if np.abs(frame.get_forces()).max() < MAX_FORCE]


def walked_frames(plans: dict[str, list[Walk]], starts: list[Atoms], model: Path, cache: Path, processes: int) -> None:
    """Write the frames of the trajectories of each plan, run with a potential; plans in the cache are left out."""
    missing = {name: plan for name, plan in plans.items() if not (cache / f"{name}.xyz").exists()}
    if not missing:
        return
    chosen = [
        bare(starts[np.random.default_rng(walk.seed).integers(len(starts))])
        for plan in missing.values()
        for walk in plan
    ]
    results = iter(walks(chosen, [walk for plan in missing.values() for walk in plan], model, processes))
    for name, plan in missing.items():
        frames = [frame for _ in plan for frame in next(results)]
        print(f"{name}: {len(frames)} frames of {len(plan)} trajectories", flush=True)
        save_frames(cache / f"{name}.xyz", frames)


def in_distribution(
    start: Atoms, model: Path, cache: Path, processes: int, known: dict[str, list[Atoms]]
) -> tuple[Atoms, dict]:
    """The last frame of the last potential's dynamics, and its errors along that, beside those on labelled splits."""
    path = cache / "check-frames.xyz"
    frames, facts = long_run(start, CHECK, model, cache / "check-run.xyz")
    times = CHECK.interval_fs / 1e3 * (1 + np.arange(len(frames)))
    if not path.exists():
        save_frames(path, frames[1::2])
    along = labelled(path, processes)
    half = len(along) // 2
    errors = {"check": along, "check_first_half": along[:half], "check_second_half": along[half:], **known}
    return bare(along[-1]), {
        **facts,
        "frames": len(along),
        "times_ps": times[1::2].tolist(),
        "force_rms_eV_per_A": round(force_rms(along), 4),
        "force_rmse_eV_per_A": {name: round(force_rmse(model, split), 4) for name, split in errors.items()},
    }


def force_rms(frames: list[Atoms]) -> float:
    """Root mean square of the force components, in eV/Å."""
    return float(np.sqrt(np.mean([frame.get_forces() ** 2 for frame in frames])))


def describe_splits(splits: dict[str, list[Atoms]]) -> dict[str, dict]:
    """Counts, seeds and settings of the splits."""
    classical = [run.seed for run in CLASSICAL["train"]]
    plans = {"train": [*ROUNDS[1], *ROUNDS[2]], **SPLITS}
    facts = {}
    for name, plan in plans.items():
        common = asdict(plan[0])
        facts[name] = {
            "count": len(splits[name]),
            "seeds": [*(classical if name == "train" else []), *(walk.seed for walk in plan)],
            "temperatures_K": sorted({walk.temperature_K for walk in plan}),
            **{key: common[key] for key in ("interval_fs", "timestep_fs", "burn_in_fs")},
            "friction_per_fs": FRICTION_PER_FS,
            "force_rms_eV_per_A": round(force_rms(splits[name]), 4),
        }
    return facts


def sampled(cache: Path, processes: int, data: dict) -> tuple[list[list[Atoms]], Path]:
    """Labelled training frames, classical ones first, then those of each round, and the potential trained on all.

    Writes the bare frames of the splits.
    """
    train = [gentle(classical_frames("train", cache, processes))]
    others = gentle(classical_frames("valid", cache, processes))
    model = trained(cache / "round-0", train[0], others, STEPS[0], data)
    for number, plan in ROUNDS.items():
        name = f"round-{number}-walks"
        walked_frames({name: plan}, train[0], model, cache, processes)
        train.append(shuffled(gentle(labelled(cache / f"{name}.xyz", processes)), seed=number))
        model = trained(cache / f"round-{number}", *split_off(train), STEPS[number], data)
    walked_frames(SPLITS, others, model, cache, processes)
    return train, model


def split_off(train: list[list[Atoms]]) -> tuple[list[Atoms], list[Atoms]]:
    """Frames to train on, and those of the rounds that are held out to choose the weights."""
    fitted = [*train[0], *(frame for part in train[1:] for frame in part[HELD_OUT:])]
    return fitted, [frame for part in train[1:] for frame in part[:HELD_OUT]]


def main() -> None:
    """Go through the stages that the cache does not hold yet, then write the files."""
    parser = arguments(HERE, "Make the water data set.")
    parser.add_argument("--cache", type=Path, default=HERE / "runs", help="folder for the results of stages")
    options = parser.parse_args()
    cache, processes = options.cache, options.processes
    cache.mkdir(parents=True, exist_ok=True)
    energies = {chemical_symbols[z]: e for z, e in isolated_atom_energies(REFERENCE, (1, 8)).items()}
    data = {"isolated_atom_energies": energies, "reference": REFERENCE}

    train, model = sampled(cache, processes, data)
    splits = {name: labelled(cache / f"{name}.xyz", processes) for name in SPLITS}
    files = {"train": shuffled([frame for part in train for frame in part], seed=0), **splits}
    fitted, held_out = split_off(train)
    first = read(cache / f"round-{len(ROUNDS)}-walks.xyz", ROUNDS[len(ROUNDS)][0].frames - 1)
    known = {"train": fitted, "held_out": held_out, **splits}
    start, check = in_distribution(first, model, cache, processes, known)
    print("in distribution:", check)
    info = describe(REFERENCE, start.numbers, describe_splits(files))
    info["versions"] |= {name: version(name) for name in ("openmm", "torch")}
    info["preliminary_potentials"] = {**RECIPE, "steps": STEPS}
    info["in_distribution"] = check
    save(options.out, info, files, start, options.force)


if __name__ == "__main__":
    main()
