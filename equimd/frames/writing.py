"""Writes frames with their labels: extxyz (also gzipped), ASE trajectories and H5MD."""

import os
from collections.abc import Iterable
from pathlib import Path

from ase import Atoms
from ase.io.jsonio import encode

from equimd.errors import InputError
from equimd.frames import xyz_writer
from equimd.frames.losses import Losses, fresh_results
from equimd.frames.reading import XYZ_SUFFIXES, format_suffix


def write_frames(path: str | Path, frames: Iterable[Atoms]) -> None:
    """Write frames to `.xyz`, `.extxyz` (`.gz` without a time stamp), `.traj`, `.h5` or `.h5md`.

    The file appears under its name, replacing an old one, only when it is whole.

    Raises:
        InputError: for another suffix, or a folder that does not exist.
    """
    path = Path(path)
    suffix = format_suffix(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; accepted: an existing folder")
    if suffix in XYZ_SUFFIXES:
        xyz_writer.write(path, frames)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        if suffix == ".traj" and path.suffix != ".gz":
            from ase.io.trajectory import Trajectory

            losses = Losses(str(path), "a trajectory of ASE")
            with Trajectory(temporary, "w") as trajectory:
                for atoms in frames:
                    trajectory.write(_for_trajectory(atoms, losses))  # pyright: ignore
        elif path.suffix.lower() in (".h5", ".h5md"):
            from equimd.frames.h5md import H5MDWriter

            with H5MDWriter(temporary) as writer:
                for index, atoms in enumerate(frames):
                    info = atoms.info
                    writer.append(atoms, step=int(info.get("step", index)), time_fs=float(info.get("time_fs", index)))
        else:
            raise InputError(f"{path}: cannot write {path.suffix!r}; accepted: .xyz .extxyz (.gz) .traj .h5 .h5md")
        if temporary.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Arrays that ASE's trajectories hold.
_STORED = {"numbers", "positions", "momenta", "masses", "tags", "initial_charges", "initial_magmoms"}


def _for_trajectory(atoms: Atoms, losses: Losses) -> Atoms:
    """The atoms with what a trajectory holds: results and info of JSON's kinds, but neither other arrays nor labels
    that are not results.

    Raises:
        InputError: if labels lie in arrays, which would be lost.
    """
    fresh_results(atoms, losses)
    for name in sorted(set(atoms.arrays) - _STORED):
        losses.add(f"the array {name!r}")
    frame = atoms.copy()
    frame.calc = atoms.calc
    kept = [constraint for constraint in atoms.constraints if hasattr(constraint, "todict")]
    for constraint in atoms.constraints:
        if constraint not in kept:
            losses.add(f"the constraint {type(constraint).__name__}")
    frame.set_constraint(kept)
    for key, value in atoms.info.items():
        try:
            encode(value)
        except TypeError:
            losses.add(f"the info {key!r} ({type(value).__name__})")
            del frame.info[key]
    return frame
