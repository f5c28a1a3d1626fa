"""What the prepare.py scripts share: seeded trajectories of a reference, checks of the frames, and the files."""

import argparse
import gzip
import hashlib
import io
import json
import multiprocessing
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols, covalent_radii
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from scipy.spatial.transform import Rotation

from equimd.references import isolated_atom_energies, reference_calculator

UNITS = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å³, tension positive", "positions": "Å"}


@dataclass(frozen=True)
class Run:
    """One trajectory: equilibrated for `burn_in` steps, which are discarded, then kept every `interval` steps."""

    reference: str
    seed: int
    temperature_K: float
    frames: int
    interval: int
    timestep_fs: float = 1.0
    burn_in: int = 2000
    friction_per_fs: float = 0.01


def trajectory(start: Atoms, run: Run) -> list[Atoms]:
    """Labelled frames of Langevin dynamics of an isolated molecule with the reference itself.

    The start is turned at random, so that no orientation is preferred; every frame is centred on its centre of mass.

    Raises:
        RuntimeError: if a bond broke or a hydrogen moved to another atom.
    """
    rng = np.random.default_rng(run.seed)
    atoms = start.copy()
    atoms.positions -= atoms.get_center_of_mass()
    atoms.positions = atoms.positions @ Rotation.random(random_state=rng).as_matrix().T
    atoms.calc = reference_calculator(run.reference)
    MaxwellBoltzmannDistribution(atoms, temperature_K=run.temperature_K, rng=rng)
    dynamics = Langevin(
        atoms,
        run.timestep_fs * units.fs,
        temperature_K=run.temperature_K,
        friction=run.friction_per_fs / units.fs,
        rng=rng,
    )
    dynamics.run(run.burn_in)
    frames = []
    for _ in range(run.frames):
        dynamics.run(run.interval)
        frames.append(_snapshot(atoms))
    check_bonds(start, frames)
    return frames


def trajectories(starts: Sequence[Atoms], runs: Sequence[Run], processes: int) -> list[list[Atoms]]:
    """The trajectories of the runs, in order, each from its own start, in worker processes."""
    context = multiprocessing.get_context("spawn")
    results: list[list[Atoms]] = []
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for frames in pool.map(trajectory, starts, runs):
            results.append(frames)
            print(f"{len(results)} of {len(runs)} trajectories", flush=True)
    return results


def _snapshot(atoms: Atoms) -> Atoms:
    frame = Atoms(numbers=atoms.numbers, positions=atoms.positions - atoms.get_center_of_mass())
    results = {"energy": float(atoms.get_potential_energy()), "forces": atoms.get_forces().copy()}
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def bonds(atoms: Atoms) -> np.ndarray:
    """Pairs (B, 2) of atoms closer than 1.25 times the sum of their covalent radii, nearest image."""
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    radii = covalent_radii[atoms.numbers]
    return np.argwhere(np.triu(distances < 1.25 * (radii[:, None] + radii[None, :]), k=1))


def check_bonds(start: Atoms, frames: Sequence[Atoms], stretch: float = 1.45) -> None:
    """Refuse frames that are no longer the molecules of `start`.

    Raises:
        RuntimeError: if a bond is longer than `stretch` times its length in `start`, or a hydrogen's nearest heavier
            atom is not the one that it was bound to.
    """
    pairs = bonds(start)
    hydrogens, heavy = np.flatnonzero(start.numbers == 1), np.flatnonzero(start.numbers > 1)
    periodic = bool(start.pbc.any())
    reference = start.get_all_distances(mic=periodic)
    owner = reference[np.ix_(hydrogens, heavy)].argmin(axis=1)
    for index, frame in enumerate(frames):
        distances = frame.get_all_distances(mic=periodic)
        ratio = distances[pairs[:, 0], pairs[:, 1]] / reference[pairs[:, 0], pairs[:, 1]]
        if ratio.max() > stretch:
            raise RuntimeError(f"frame {index}: bond {pairs[ratio.argmax()]} is {ratio.max():.2f} times its length")
        if (distances[np.ix_(hydrogens, heavy)].argmin(axis=1) != owner).any():
            raise RuntimeError(f"frame {index}: a hydrogen moved to another atom")


def compressed(frames: Sequence[Atoms]) -> bytes:
    """The frames as gzipped extended XYZ with 8 decimals; the same frames give the same bytes."""
    text = io.StringIO()
    write(text, list(frames), format="extxyz")
    slim = "\n".join(" ".join(line.split()) for line in text.getvalue().split("\n"))
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        file.write(slim.encode())
    return buffer.getvalue()


def arguments(here: Path, description: str) -> argparse.ArgumentParser:
    """The options that every prepare.py has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--processes", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--out", type=Path, default=here, help="folder to write to (default: beside this script)")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")
    return parser


def describe(reference: str, numbers: Sequence[int], splits: dict[str, dict]) -> dict:
    """What info.json says about every data set; `save` adds counts and hashes."""
    energies = isolated_atom_energies(reference, numbers)
    packages = {name: version(name) for name in ("tblite", "ase", "numpy", "scipy")}
    return {
        "reference": reference,
        "units": UNITS,
        "isolated_atom_energies": {chemical_symbols[number]: energy for number, energy in energies.items()},
        "splits": splits,
        "versions": {"python": platform.python_version(), **packages},
    }


def summary(runs: Sequence[Run]) -> dict:
    """What a split's runs have in common, and their seeds."""
    common = asdict(runs[0])
    for key in ("reference", "seed", "frames"):
        del common[key]
    return {"count": sum(run.frames for run in runs), "seeds": [run.seed for run in runs], **common}


def save(out: Path, info: dict, splits: dict[str, list[Atoms]], start: Atoms, force: bool) -> None:
    """Write the splits, start.xyz and info.json with their hashes; say which existing file differs.

    Exits with status 1, having written nothing, if a file exists with other contents and `force` is not set.
    """
    files = {f"{name}.xyz.gz": compressed(frames) for name, frames in splits.items()}
    text = io.StringIO()
    write(text, start, format="extxyz")
    files["start.xyz"] = text.getvalue().encode()
    info = {**info, "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}}
    existing = [name for name in files if (out / name).exists()]
    differing = [name for name in existing if (out / name).read_bytes() != files[name]]
    for name in files:
        state = "differs" if name in differing else "same bytes" if name in existing else "new"
        print(f"{name}: {state}, {len(files[name])} bytes, sha256 {info['sha256'][name]}")
    if differing and not force:
        sys.exit(f"not written, because these files differ: {', '.join(differing)} (--force overwrites them)")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    (out / "info.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
