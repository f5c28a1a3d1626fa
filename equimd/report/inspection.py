"""What files of frames hold, for whoever is about to train on them: counts, spreads, outliers, duplicates."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from equimd.errors import InputError
from equimd.frames import Frames, LabelKeys
from equimd.frames.arrays import FrameArrays
from equimd.frames.compositions import fit_atomic_energies
from equimd.frames.electrons import differing
from equimd.frames.fingerprints import duplicates_between, duplicates_within
from equimd.frames.packing import Packer
from equimd.report.survey import Outlier, Survey
from equimd.results import Block, Result

N_LISTED = 20
MOST_CUTOFF = 30.0
"""Å; neighbours of an atom grow with its third power: 10,000 in a metal."""
_NET_FORCE = 0.02  # eV/Å per atom: beyond what rounding leaves of forces that add up to zero


Progress = Callable[[str, int, int], None]
Draw = Callable[[list[str], list[Survey]], None]


class Spread(Block):
    """Smallest, mean and largest."""

    low: float
    mean: float
    high: float


class Electrons(Block):
    """A charge in e, a multiplicity 2S + 1 or a spin that frames state under a name; the first of them."""

    what: str
    value: float
    name: str
    first_frame: int
    n_frames: int

    @classmethod
    def of(cls, entry: Sequence[Any]) -> "Electrons":
        """From an entry of a ``Tally``."""
        return cls(**dict(zip(cls.model_fields, entry, strict=True)))


class Inspection(Result):
    """One file. Energies in eV per atom, forces in eV/Å, distances in Å; lists of frames hold the first N_LISTED.

    n_labelled counts frames that carry each label; force_quantiles are of the length of the force on an atom, by
    percent; energy_residual is the RMS of what a fit of atomic energies leaves, per atom; net_force counts frames of
    molecules whose forces do not add up to zero; neighbors are those of an atom within the cutoff; electrons are the
    charges and spins that frames state; lossy says how the format rounded positions.
    """

    path: str
    n_frames: int
    n_atoms: list[int]
    elements: dict[str, int]
    isolated_atoms: dict[str, float]
    periodic: int
    volume_per_atom: Spread | None
    n_labelled: dict[str, int]
    not_finite: list[tuple[int, str]]
    n_not_finite: int
    energy_per_atom: list[float] | None
    energy_residual: float | None
    force_rms: float | None
    force_rms_by_element: dict[str, float]
    force_quantiles: dict[str, float] | None
    n_net_force: int
    cutoff: float
    neighbors: Spread
    shortest: float | None
    outliers: list[Outlier]
    n_outliers: int
    duplicates: list[tuple[int, int]]
    n_duplicates: int
    electrons: list[Electrons]
    warnings: list[str]
    lossy: str | None = None


class Shared(Block):
    """Frames of one file that another holds too, as (frame, frame there); and elements that the other lacks."""

    file: str
    other: str
    n_frames: int
    frames: list[tuple[int, int]]
    new_elements: list[str]


class Comparison(Result):
    """Several files, the first of which is taken for the training set."""

    files: list[Inspection]
    shared: list[Shared]


def inspect_files(
    files: Sequence[Frames],
    cutoff: float,
    progress: Progress | None = None,
    draw: Draw | None = None,
    keys: LabelKeys | None = None,
) -> Inspection | Comparison:
    """Read every file once, frame by frame, and look at it; what outgrows memory goes to a temporary folder.

    ``progress(file, frames done, frames)`` hears how far it is; ``draw`` gets the surveys while their arrays are there;
    ``keys`` are the names of labels that the files were opened with.

    Raises:
        InputError: for no frames, or frames that make no sense at all.
    """
    if not 0 < cutoff <= MOST_CUTOFF:
        raise InputError(f"the cutoff is {cutoff:g} Å; accepted is a positive number up to {MOST_CUTOFF:g}")
    with tempfile.TemporaryDirectory(prefix="equimd-inspect-") as folder:
        packed = [_pack(file, cutoff, Path(folder), progress, keys) for file in files]
        common = _atomic_energies(packed[0])
        surveys = []
        for arrays in packed:
            fits = common is not None and not set(arrays.meta["species"]) - set(common)
            surveys.append(Survey(arrays, common if fits else _atomic_energies(arrays)))
        looked = [_look(str(file.path), survey, file.lossy) for file, survey in zip(files, surveys, strict=True)]
        if draw is not None:
            draw([file.path.name for file in files], surveys)
        if len(files) == 1:
            return looked[0]
        places = [(a, b) for a in range(len(files)) for b in range(a + 1, len(files))]
        shared = [_shared(looked[b].path, packed[b], looked[a].path, packed[a]) for a, b in places]
        return Comparison(files=looked, shared=shared)


def _pack(file: Frames, cutoff: float, folder: Path, progress: Progress | None, keys: LabelKeys | None) -> FrameArrays:
    total = len(file) if file.source.count is not None else 0

    def seen() -> Iterator[tuple[int, Any]]:
        for item in file.select(lambda index, n_atoms: True):
            if progress is not None and item[0] % 100 == 0:
                progress(file.path.name, item[0], max(total, item[0] + 1))
            yield item

    with Packer(cutoff, lambda: Path(tempfile.mkdtemp(dir=folder)), keys=keys) as packer:
        packer.add_file(seen(), str(file.path))
        arrays = packer.finish()
    if not len(arrays):
        raise InputError(f"{file.path}: holds no frames; accepted: one or more")
    if progress is not None:
        progress(file.path.name, max(total, 1), max(total, 1))
    return arrays


def _atomic_energies(arrays: FrameArrays) -> dict[int, float] | None:
    if not arrays.meta["n_labelled"]["energy"]:
        return None
    species = arrays.meta["species"]
    return fit_atomic_energies(arrays, dict.fromkeys(species, 0.0), species, by_charge=True).energies


def _look(path: str, survey: Survey, lossy: str | None) -> Inspection:
    arrays = survey.arrays
    periodic = np.asarray(arrays["pbc"]).any(axis=1)
    index, n_atoms = np.asarray(arrays["index"]), np.asarray(arrays["n_atoms"])
    energy = _finite(np.asarray(arrays["energy"]) / n_atoms)
    residual = _finite(survey.energy)
    n_components = sum(survey.components.values())
    outliers, pairs = survey.outliers(), duplicates_within(arrays)
    bad = arrays.meta["not_finite"]
    percent = (50, 90, 99, 100)
    return Inspection(
        path=path,
        n_frames=len(arrays),
        n_atoms=[int(n) for n in np.unique(n_atoms)],
        elements={chemical_symbols[z]: count for z, count in survey.n_atoms.items()},
        isolated_atoms={chemical_symbols[int(z)]: float(e) for z, e in arrays.meta["isolated_atoms"].items()},
        periodic=int(periodic.sum()),
        volume_per_atom=_spread(np.abs(np.linalg.det(np.asarray(arrays["cell"])[periodic])) / n_atoms[periodic]),
        n_labelled=dict(arrays.meta["n_labelled"]),
        not_finite=[(int(k), str(what)) for k, what in bad[:N_LISTED]],
        n_not_finite=len(bad),
        energy_per_atom=[float(energy.min()), float(energy.mean()), float(energy.max())] if len(energy) else None,
        energy_residual=float(np.sqrt(np.mean(residual**2))) if len(residual) else None,
        force_rms=(sum(survey.squares.values()) / n_components) ** 0.5 if n_components else None,
        force_rms_by_element={
            chemical_symbols[z]: (survey.squares[z] / count) ** 0.5 for z, count in survey.components.items() if count
        },
        force_quantiles=dict(zip(map(str, percent), np.percentile(survey.lengths, percent).tolist(), strict=True))
        if n_components
        else None,
        n_net_force=int((~periodic & (n_atoms > 1) & (survey.net_force > _NET_FORCE)).sum()),
        cutoff=arrays.meta["cutoff"],
        neighbors=Spread(
            low=float((arrays["n_edges"] / n_atoms).min()),
            mean=float(arrays.edge_start[-1] / arrays.atom_start[-1]),
            high=float((arrays["n_edges"] / n_atoms).max()),
        ),
        shortest=float(survey.closest.min()) if np.isfinite(survey.closest).any() else None,
        outliers=outliers[:N_LISTED],
        n_outliers=len(outliers),
        duplicates=[(int(index[a]), int(index[b])) for a, b in pairs[:N_LISTED]],
        n_duplicates=len(pairs),
        electrons=[Electrons.of(entry) for entry in arrays.meta["electrons"]],
        warnings=_warnings(path, arrays),
        lossy=lossy,
    )


def _warnings(path: str, arrays: FrameArrays) -> list[str]:
    """What is odd about the set as a whole, one line each."""
    lines = [str(message) for kind in ("implausible", "unclaimed") for _, message in arrays.meta[kind]]
    if message := differing(arrays.meta["electrons"], lambda index: f"{path}, frame {index}"):
        lines.append(f"{message}: training refuses the set")
    for by, count, first in arrays.meta["predictions"]:
        lines.append(
            f"{count} frames (first: frame {first}) carry predictions ({by}), not labels: training refuses them unless"
            " data.accept_predictions is true"
        )
    if len(alone := arrays.lone_atoms()):
        lines.append(
            f"{len(alone)} frames are single atoms (first: frame {alone[0]}): with config_type=IsolatedAtom their"
            " energies are taken for those of isolated atoms, without it they are learned like any other frame"
        )
    return lines


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _spread(values: np.ndarray) -> Spread | None:
    if not len(values):
        return None
    return Spread(low=float(values.min()), mean=float(values.mean()), high=float(values.max()))


def _shared(name: str, arrays: FrameArrays, other_name: str, other: FrameArrays) -> Shared:
    pairs = duplicates_between(other, arrays)
    index, there = arrays["index"], other["index"]
    return Shared(
        file=name,
        other=other_name,
        n_frames=len(pairs),
        frames=[(int(index[k]), int(there[p])) for k, p in pairs[:N_LISTED]],
        new_elements=[chemical_symbols[z] for z in arrays.meta["species"] if z not in other.meta["species"]],
    )


def suggest_recipe(
    files: Sequence[Inspection], units: Sequence[str] = (), keys: Sequence[str] = (), shared: Sequence[Shared] = ()
) -> str:
    """The part of a recipe that these files decide, as YAML; the first file is the training set.

    ``units`` and ``keys`` are what they were read with, each as WHAT=NAME; ``shared`` says which frames are in two.
    """
    first = files[0]
    lines = ["data:", *_split_lines(files, shared)]
    lines += _electron_lines(first)
    for name, pairs in (("units", units), ("keys", keys)):
        if pairs:
            lines.append(f"  {name}: {{{', '.join(pair.replace('=', ': ', 1) for pair in pairs)}}}")
    missing = [symbol for symbol in first.elements if symbol not in first.isolated_atoms]
    if missing:
        lines.append(
            f"  isolated_atom_energies: {{{', '.join(f'{symbol}: ...' for symbol in missing)}}}  # or leave out: fitted"
        )
    lines.append("loss:")
    for term, weight in (("energy", 1.0), ("forces", 1.0), ("stress", 10.0)):
        lines.append(f"  {term}: {weight if first.n_labelled[term] else 0.0}")
    edges = first.neighbors.mean * sum(first.elements.values()) / first.n_frames
    lines += ["batch:", f"  n_frames: {int(min(32, max(1, round(600 / max(edges, 1)))))}"]
    return "\n".join(lines)


def _split_lines(files: Sequence[Inspection], shared: Sequence[Shared]) -> list[str]:
    """Which file is which split: by its name, else in order; none that shares frames with the training set."""
    train, *others = files
    leaks = {one.file: one.n_frames for one in shared if one.other == train.path and one.n_frames}
    chosen: dict[str, str] = {}
    for file in (one for one in others if one.path not in leaks):
        name = Path(file.path).name.lower()
        wanted = ["test", "valid"] if "test" in name else ["valid", "test"]
        free = [split for split in wanted if split not in chosen]
        if free:
            chosen[free[0]] = file.path
    lines = [f"  train: {train.path}", f"  valid: {chosen.get('valid', '...  # frames of other trajectories')}"]
    lines += [f"  test: {chosen['test']}"] if "test" in chosen else []
    return lines + [f"  # left out: {n} frames of {path} are training frames too" for path, n in leaks.items()]


def _electron_lines(first: Inspection) -> list[str]:
    """Charge and multiplicity, if frames state one that is not the default."""
    lines = []
    for key, default in (("charge", 0.0), ("multiplicity", 1.0)):
        values = {
            max(one.value, default) if one.what == "spin" else one.value
            for one in first.electrons
            if key == ("charge" if one.what == "charge" else "multiplicity")
        }
        if len(values) == 1 and values != {default}:
            lines.append(f"  {key}: {values.pop():g}")
    return lines
