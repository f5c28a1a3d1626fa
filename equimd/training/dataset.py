"""What a recipe trains on: its splits read, checked against each other, and what was measured on them."""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from equimd.errors import InputError
from equimd.frames import LabelKeys, UnitSpec
from equimd.frames.arrays import FrameArrays
from equimd.frames.compositions import composition_counts
from equimd.frames.electrons import check_set
from equimd.frames.fingerprints import duplicates_between
from equimd.results import Block
from equimd.theory import is_same_level, method_of
from equimd.training.cache import Request, file_sha256, frame_arrays, remembered
from equimd.training.data import FrameSet, check_frame_set, first_with
from equimd.training.levels import check_level
from equimd.training.recipe import Recipe
from equimd.training.statistics import IsolatedAtomEnergies, Statistics, isolated_atom_energies, statistics

_N_SHOWN = 3


class Duplicates(Block):
    """Frames of a split that are in another as well: (place there, place in the other)."""

    pairs: list[tuple[int, int]]


@dataclass(frozen=True)
class Dataset:
    """The splits of a recipe, what was measured on them, and the SHA-256 of each file."""

    train: FrameSet
    valid: FrameSet
    test: FrameSet | None
    atoms: IsolatedAtomEnergies
    statistics: Statistics
    sha256: dict[str, str]

    def header(self) -> dict[str, Any]:
        """What a checkpoint says of its data."""
        return {
            "data_sha256": self.sha256,
            "n_train": len(self.train),
            "isolated_atom_energies_from": {chemical_symbols[z]: origin for z, origin in self.atoms.origin.items()},
        }

    def start(self) -> Atoms:
        """The training frame of the lowest energy beyond the fit, per atom; the first one if there are no energies."""
        arrays = self.train.arrays
        energies = np.array([self.atoms.energies[z] + self.statistics.shift[z] for z in self.train.species])
        beyond = np.concatenate(
            [
                (arrays["energy"][frames] - composition_counts(arrays, frames, atoms) @ energies)
                / arrays["n_atoms"][frames]
                for frames, atoms, _ in arrays.chunks()
            ]
        )
        beyond[np.asarray(arrays["n_atoms"]) == 1] += 1e9  # only if there is nothing else
        frame = arrays.frame(int(np.nanargmin(beyond)) if np.isfinite(beyond).any() else 0)
        return Atoms(frame["numbers"], frame["positions"], cell=frame["cell"], pbc=frame["pbc"])

    def summary(self) -> list[str]:
        """Lines for whoever starts the training."""
        sizes = ", ".join(
            f"{len(frames):,} {name}"
            for name, frames in (("training", self.train), ("validation", self.valid), ("test", self.test))
            if frames is not None
        )
        numbers = self.statistics
        lines = [
            f"{sizes} frames; RMS force {numbers.force_rms:.4g} eV/Å, {numbers.mean_neighbors:.1f} neighbours per atom",
            f"labels of training frames: {_labels(self.train)}; of validation frames: {_labels(self.valid)}",
        ]
        for origin, how in (
            ("least squares", "fitted by least squares"),
            ("isolated atoms", "of isolated atoms"),
            ("parent", "of the checkpoint that it starts from"),
        ):
            chosen = [z for z in self.train.species if self.atoms.origin.get(z) == origin]
            if chosen:
                values = ", ".join(f"{chemical_symbols[z]} {self.atoms.energies[z]:.4f}" for z in chosen)
                lines.append(f"isolated-atom energies {how}: {values} eV")
        if len(alone := self.train.arrays.lone_atoms()):
            lines.append(
                f"{len(alone)} training frames are single atoms (first: frame {alone[0]}), learned like any other; with"
                " config_type=IsolatedAtom their energies become the isolated-atom energies"
            )
        if not self.atoms.determined:
            lines.append(
                "the compositions do not tell the elements apart: of the fitted energies only sums mean something"
            )
        return lines


def _labels(frames: FrameSet) -> str:
    counts = frames.arrays.meta["n_labelled"].items()
    return ", ".join(f"{label} in {'all' if n == len(frames) else f'{n:,}' if n else 'none'}" for label, n in counts)


def read_data(recipe: Recipe, progress: bool = False) -> Dataset:
    """Read the splits, from the cache where it has them, and check them.

    Raises:
        InputError: for a file that is missing, empty or malformed; labels that are not finite or missing where the loss
            needs them; implausible numbers where the recipe states no units; an element without isolated-atom energy
            or without training frames; frames of the training set in another split.
    """
    table = recipe.isolated_atom_energies()
    units, keys = _reading(recipe)
    sets: dict[str, FrameSet] = {}
    names: dict[str, str] = {}
    sha256: dict[str, str] = {}
    for split in ("train", "valid", "test"):
        files = recipe.data.files(split)
        if not files:
            continue
        paths = tuple(recipe.path(file) for file in files)
        sha256 |= {file: file_sha256(path) for file, path in zip(files, paths, strict=True)}
        n_frames = recipe.data.n_train if split == "train" else None
        seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
        request = Request(paths, units, keys, recipe.model.cutoff, n_frames, seed)
        names[split] = request.name
        arrays = frame_arrays(request, progress)
        _check_plausible(recipe, arrays, paths)
        _check_electrons(recipe, split, arrays)
        _check_origin(recipe, split, arrays)
        _check_levels(recipe, split, arrays)
        for file, message in arrays.meta["unclaimed"]:
            warnings.warn(f"{paths[file]}: {message}", UserWarning, stacklevel=2)
        sets[split] = FrameSet.from_arrays(arrays)
    for split, frames in sets.items():
        check_frame_set(frames, table, names[split])
        _check_species(split, frames, sets["train"])
    atoms = isolated_atom_energies(sets["train"].arrays, table, recipe.isolated_atom_energies_of_parent())
    _check_labels(recipe, sets["train"], sets["valid"])
    _check_duplicates(recipe, sets)
    numbers = statistics(sets["train"].arrays, atoms.energies)
    if recipe.loss.largest("energy") > 0:
        check_level(atoms, numbers)
    return Dataset(
        train=sets["train"],
        valid=sets["valid"],
        test=sets.get("test"),
        atoms=atoms,
        statistics=numbers,
        sha256=sha256,
    )


def _reading(recipe: Recipe) -> tuple[UnitSpec | None, LabelKeys | None]:
    units, keys = recipe.data.units, recipe.data.keys
    return (
        None if units is None else UnitSpec(**units.model_dump()),
        None if keys is None else LabelKeys(**keys.model_dump()),
    )


def _check_plausible(recipe: Recipe, arrays: FrameArrays, paths: tuple[Path, ...]) -> None:
    for file, message in arrays.meta["implausible"]:
        if recipe.data.units is None:
            raise InputError(f"{paths[file]}: {message}; state data.units in the recipe, also where they are eV and Å")
        warnings.warn(f"{paths[file]}: {message}", UserWarning, stacklevel=2)


def _check_electrons(recipe: Recipe, split: str, arrays: FrameArrays) -> None:
    section = recipe.data
    check_set(
        arrays.meta["electrons"],
        section.charge,
        section.multiplicity,
        lambda index: "{}, frame {}".format(*_place(recipe, split, arrays, index)),
    )


def _check_origin(recipe: Recipe, split: str, arrays: FrameArrays) -> None:
    """Refuse predictions of a potential as labels, unless the recipe says that they are wanted."""
    if recipe.data.accept_predictions or not arrays.meta["predictions"]:
        return
    by, count, first = arrays.meta["predictions"][0]
    file, frame = _place(recipe, split, arrays, first)
    raise InputError(
        f"{file}, frame {frame}: energy and forces are predictions ({by}), not labels, as in {count} frames of the"
        " set; accepted: frames that a reference method labelled, or data.accept_predictions: true"
    )


def _check_levels(recipe: Recipe, split: str, arrays: FrameArrays) -> None:
    """Refuse labels of another level of theory than the recipe states; warn if frames of a set state several."""
    levels, stated = arrays.meta["levels"], recipe.data.reference
    for level, count, first in levels:
        file, frame = _place(recipe, split, arrays, first)
        if method_of(stated) is not None and not is_same_level(level, str(stated)):
            raise InputError(
                f"{file}, frame {frame}: labelled by {level}, as {count} frames say, but data.reference is {stated};"
                " accepted: frames of that level, or the level of the labels as data.reference"
            )
        if not is_same_level(level, levels[0][0]):
            warnings.warn(
                f"{file}, frame {frame}: labelled by {level}, others of the set by {levels[0][0]}: one potential is for"
                " one level of theory",
                UserWarning,
                stacklevel=3,
            )


def _place(recipe: Recipe, split: str, arrays: FrameArrays, index: int) -> tuple[str, int]:
    """The file of a split, as the recipe names it, and the place in it of the frame with this index."""
    for file, count in zip(recipe.data.files(split), arrays.meta["files"], strict=True):
        if index < count:
            return file, index
        index -= count
    raise AssertionError("an index lies within the files")


def _check_species(split: str, frames: FrameSet, train: FrameSet) -> None:
    extra = sorted(set(frames.species) - set(train.species))
    if extra:
        raise InputError(
            f"data.{split} has {chemical_symbols[extra[0]]} (first in frame {first_with(frames.arrays, extra[0])}),"
            f" which no training frame has; accepted are {', '.join(chemical_symbols[z] for z in train.species)}"
        )


def _check_labels(recipe: Recipe, train: FrameSet, valid: FrameSet) -> None:
    for term in ("energy", "forces", "stress"):
        weight = recipe.loss.largest(term)
        if weight > 0 and not train.has(term):
            raise InputError(
                f"loss.{term} is {weight:g} but {', '.join(recipe.data.files('train'))} has no {term} labels; set it to"
                " 0 or name the labels in data.keys"
            )
    for name in ("denoising", "pretraining"):
        if getattr(recipe, name) is not None and not train.has("forces"):
            files = ", ".join(recipe.data.files("train"))
            raise InputError(f"{name} needs forces but {files} has no forces labels; leave {name} out")
    metric = recipe.validation.metric
    if not valid.has("forces" if metric.startswith("force") else "energy"):
        raise InputError(
            f"validation.metric is {metric!r} but {', '.join(recipe.data.files('valid'))} has no such labels;"
            " accepted is one of force_mae, force_rmse, energy_mae, energy_rmse that it has labels for"
        )


def _check_duplicates(recipe: Recipe, sets: dict[str, FrameSet]) -> None:
    """Frames of one split in another; those of the test set in the validation set, which chooses weights, only warn."""
    if recipe.data.duplicates == "allow":
        return
    for split, known in (("valid", "train"), ("test", "train"), ("test", "valid")):
        if split not in sets:
            continue
        one, other = sets[known].arrays, sets[split].arrays
        found = remembered(
            one if one.folder is not None else other,
            "duplicates",
            (one.meta["key"], other.meta["key"]),
            Duplicates,
            partial(_find_duplicates, one, other),
        )
        if found.pairs:
            message = describe_duplicates(recipe, split, other, known, one, found.pairs)
            if recipe.data.duplicates == "error" and known == "train":
                raise InputError(f"{message}; remove them, or set data.duplicates to warn or allow")
            warnings.warn(message, UserWarning, stacklevel=2)


def _find_duplicates(known: FrameArrays, other: FrameArrays) -> Duplicates:
    return Duplicates(pairs=duplicates_between(known, other))


def describe_duplicates(
    recipe: Recipe, split: str, other: FrameArrays, known: str, arrays: FrameArrays, pairs: list[tuple[int, int]]
) -> str:
    """One line: how many, and the first of them."""

    def name(arrays: FrameArrays, which: str, place: int) -> str:
        file, index = _place(recipe, which, arrays, int(arrays["index"][place]))
        return str(index) if len(recipe.data.files(which)) == 1 else f"{index} of {file}"

    kind = {"train": "training", "valid": "validation"}[known]
    shown = ", ".join(f"{name(other, split, k)} ({kind} frame {name(arrays, known, p)})" for k, p in pairs[:_N_SHOWN])
    more = ", ..." if len(pairs) > _N_SHOWN else ""
    return f"{len(pairs)} of {len(other)} frames of data.{split} are in the {kind} set too: {shown}{more}"
