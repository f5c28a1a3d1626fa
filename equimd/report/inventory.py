"""What is there: the installation and its potentials, and what a file of frames holds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from equimd.errors import InputError
from equimd.frames import check_plausible, labels_of
from equimd.results import Block, Provenance, Result, provenance


class PotentialInfo(Block):
    """A potential that is ready to run, and its card (null without one)."""

    name: str
    path: str
    card: dict[str, Any] | None


class Inventory(Result):
    """Versions, devices and potentials."""

    devices: list[str]
    potentials: list[PotentialInfo]
    provenance: Provenance


class DataSummary(Result):
    """What frames hold: n_labelled counts frames that carry each label; force_rms in eV/Å over all labelled."""

    path: str
    n_frames: int
    n_atoms: list[int]
    elements: dict[str, int]
    periodic: int
    n_labelled: dict[str, int]
    energy_per_atom: list[float] | None
    force_rms: float | None
    warnings: list[str]


def inventory() -> Inventory:
    """What this installation offers on this machine."""
    import torch
    import yaml

    from equimd.models.checkpoint import find_potential, list_potentials

    potentials = []
    for name in list_potentials():
        folder = find_potential(name)
        file = folder / "card.yaml"
        card = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        potentials.append(PotentialInfo(name=name, path=str(folder), card=_plain(card)))
    devices = ["cpu"] + [f"cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())]
    return Inventory(devices=devices, potentials=potentials, provenance=provenance())


def _plain(value: Any) -> Any:
    """YAML's dates as text, so that a card fits into JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def summarise(path: str | Path, frames: Iterable[Atoms]) -> DataSummary:
    """Count what the frames hold and check its plausibility; energies as [lowest, mean, highest] per atom in eV."""
    counts = {"energy": 0, "forces": 0, "stress": 0}
    elements: dict[str, int] = {}
    sizes, energies, first = set(), [], []
    squares, components, n_frames, periodic = 0.0, 0, 0, 0
    for frame in frames:
        n_frames += 1
        if len(first) < 64:
            first.append(frame)
        sizes.add(len(frame))
        periodic += bool(frame.pbc.any())
        for number, count in zip(*np.unique(frame.numbers, return_counts=True), strict=True):
            symbol = chemical_symbols[number]
            elements[symbol] = elements.get(symbol, 0) + int(count)
        labels = labels_of(frame)
        for key in counts:
            counts[key] += labels[key] is not None
        if labels["energy"] is not None and len(frame):
            energies.append(labels["energy"] / len(frame))
        if labels["forces"] is not None:
            squares, components = squares + float((labels["forces"] ** 2).sum()), components + labels["forces"].size
    if n_frames == 0:
        raise InputError(f"{path} holds 0 frames; expected at least 1")
    return DataSummary(
        path=str(path),
        n_frames=n_frames,
        n_atoms=sorted(sizes),
        elements=elements,
        periodic=periodic,
        n_labelled=counts,
        energy_per_atom=[min(energies), float(np.mean(energies)), max(energies)] if energies else None,
        force_rms=float(np.sqrt(squares / components)) if components else None,
        warnings=list(check_plausible(first)),
    )
