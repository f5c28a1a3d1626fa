"""Finds what looks like a label of a frame and is not read as one: energies, forces and stresses under other names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import numpy as np
from ase import Atoms

from equimd.frames.labels import DEFAULT_KEYS, KNOWN_NAMES, LabelKeys, labels_of

# Parts of a name, between underscores, dots, hyphens, digits and capitals, that say what a number is.
_KINDS = {
    "energy": re.compile(r"energ|^(e|etot|toten|u|u0)$"),
    "forces": re.compile(r"force|gradient|^(f|frc|grad|grads)$"),
    "stress": re.compile(r"stress"),
    "virial": re.compile(r"virial"),
}
# Parts that say that a number is no label of the whole frame: settings, weights, parts of an energy, errors.
_NO_LABEL = re.compile(
    r"(config)?weights?|cut(off)?|tol(erance)?|conv(ergence|erged)?|thresh(old)?|criteri(on|a)|kinetic|nuclear|repulsion"
    r"|correlation|exchange|dispersion|solvation|fermi|gap|hull|homo|lumo|zpe|ionization|excitation|electronvolts?"
    r"|err(or)?s?|mae|rmse|std|var(iance)?|unc(ertainty)?|max|min|rms|norm|units?|shift|scale|counts?|number|steps?"
    r"|constant|level|type|per|field"
)
_LIKELY = ("energy", "forces", "stress", "virial", "gradient")


@dataclass
class _Found:
    """Frames that hold a name: without a label of its kind, and beside one."""

    missing: int = 0
    beside: int = 0


def unclaimed_labels(frames: Iterable[Atoms], keys: LabelKeys = DEFAULT_KEYS) -> list[str]:
    """Messages, one line each, about entries of `info` and `arrays` that look like labels and are not read.

    An entry looks like a label if its name says so (``pbe_forces``, ``Etot``, ``REF_enregy``) and its shape fits: a
    number for an energy, (N, 3) for forces, six or nine numbers for a stress or virial. Entries that frames hold
    instead of a label come first, one line for each name; those that all their frames hold beside a label, as other
    levels of theory are stored, share one line for each kind.

    Args:
        frames: Frames as `read_frames` gives them, or with labels in `info` and `arrays`; they are gone through once.
        keys: The names that were asked for: what lies beside a label that was asked for is passed over.

    Raises:
        InputError: if two usual names of one label carry different values in a frame without a calculator.
    """
    found: dict[tuple[str, str, str], _Found] = {}
    n_frames = 0
    for atoms in frames:
        n_frames += 1
        entries = _entries(atoms)
        if not entries:
            continue
        labels = labels_of(atoms)
        for kind, place, name in entries:
            has_label = labels["stress" if kind == "virial" else kind] is not None
            if has_label and (getattr(keys, kind) is not None or (atoms.calc is None and _known_kind(name))):
                continue
            counts = found.setdefault((kind, place, name), _Found())
            counts.beside += has_label
            counts.missing += not has_label
    messages = [_missing(*key, counts.missing, n_frames) for key, counts in found.items() if counts.missing]
    for kind in _KINDS:
        names = [name for (of, _, name), counts in found.items() if of == kind and not counts.missing]
        if names:
            most = max(found[key].beside for key in found if key[0] == kind and key[2] in names)
            label = "stress" if kind == "virial" else kind
            listed = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            messages.append(
                f"{most} of {n_frames} frames have {listed} beside the {label} that is read;"
                f" if another is meant, name it with data.keys {kind}=NAME"
            )
    return messages


def _missing(kind: str, place: str, name: str, n: int, n_frames: int) -> str:
    what = f"{n} of {n_frames} frames have {place} {name!r} of the shape of {_article(kind)} that is not read, and no"
    what += f" {'stress' if kind == 'virial' else kind}"
    if kind == "forces" and "grad" in name.lower():
        return f"{what}; forces are the negative gradient: store them as a column 'forces'"
    if kind == "forces" and not place.startswith("an array"):
        return f"{what}; store forces as a column with three numbers for each atom"
    return f"{what}; name it with data.keys {kind}={name}"


def _article(kind: str) -> str:
    return {"energy": "an energy", "forces": "forces", "stress": "a stress", "virial": "a virial"}[kind]


def _entries(atoms: Atoms) -> list[tuple[str, str, str]]:
    """(kind, where it is, name) of everything in a frame that looks like a label."""
    entries = [(name, "an array", value) for name, value in atoms.arrays.items() if name not in _OF_ATOMS]
    entries += [(name, "an info entry", value) for name, value in atoms.info.items() if isinstance(name, str)]
    with_kind = [(looks_like(name), place, name, value) for name, place, value in entries]
    return [
        (kind, place, name)
        for kind, place, name, value in with_kind
        if kind is not None and _fits(kind, place, value, atoms)
    ]


# What ASE itself keeps for each atom.
_OF_ATOMS = {"numbers", "positions", "momenta", "masses", "tags", "initial_charges", "initial_magmoms"}


@lru_cache
def looks_like(name: str) -> str | None:
    """The kind of label (energy, forces, stress, virial) that a name suggests; None if it suggests none."""
    if (known := _known_kind(name)) is not None:
        return known
    # A part of an energy, or an energy for each atom, is no label of the frame.
    parts = [part.lower() for part in re.split(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])", name) if part]
    if any(_NO_LABEL.fullmatch(part) for part in parts if not _kind_of(part)):
        return None
    return next((kind for part in reversed(parts) if (kind := _kind_of(part)) is not None), None)


def _known_kind(name: str) -> str | None:
    return next((kind for kind, names in KNOWN_NAMES.items() if name.lower() in names), None)


def _kind_of(part: str) -> str | None:
    for kind, pattern in _KINDS.items():
        if pattern.search(part):
            return kind
    near = get_close_matches(part, _LIKELY, n=1, cutoff=0.8)
    return {"gradient": "forces"}.get(near[0], near[0]) if near else None


def _fits(kind: str, place: str, value: Any, atoms: Atoms) -> bool:
    try:
        array = np.asarray(value)
    except ValueError:  # of unequal lengths
        return False
    if array.dtype.kind not in "fi":
        return False
    if kind == "energy":
        return place != "an array" and array.size == 1
    if kind == "forces":
        return array.size == 3 * len(atoms) if place != "an array" else array.shape == (len(atoms), 3)
    return place != "an array" and array.shape in ((6,), (9,), (3, 3)) and bool(atoms.pbc.any())
