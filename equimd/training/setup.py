"""From a recipe to what the loop needs: frames, potential, the average of its weights, and the checkpoints' header."""

import copy
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms
from ase.data import chemical_symbols

from equimd.models.potential import Potential
from equimd.models.selfcheck import check_training_kernels
from equimd.training.data import FrameSet
from equimd.training.dataset import read_data
from equimd.training.initial import make_potential
from equimd.training.recipe import Recipe
from equimd.training.schedule import EXTENDABLE


@dataclass
class Setup:
    """What a training works with; ``average`` holds the averaged weights and starts equal to ``potential``.

    ``start`` is a training frame without labels, for MD runs to begin with.
    """

    train: FrameSet
    valid: FrameSet
    test: FrameSet | None
    start: Atoms
    potential: Potential
    average: Potential
    stress: bool
    device: torch.device
    header: dict[str, Any]
    identity: dict[str, Any]


def prepare(recipe: Recipe, device: torch.device, progress: bool = False) -> Setup:
    """Read the data, make the potential that the recipe begins with."""
    data = read_data(recipe, progress)
    train = data.train
    potential, ancestry = make_potential(recipe, train, data.atoms.energies, data.statistics)
    potential = potential.to(device=device)
    check_training_kernels(potential)
    resolved = recipe.model_dump(mode="json")
    resolved["model"] = potential.settings.model_dump(mode="json")
    resolved["data"]["isolated_atom_energies"] = {
        chemical_symbols[z]: energy for z, energy in data.atoms.energies.items()
    }
    header = {
        "name": recipe.name,
        "recipe": resolved,
        **data.header(),
        "reference": recipe.data.reference,
        "charge": recipe.data.charge,
        "multiplicity": recipe.data.multiplicity,
        **({"ancestry": ancestry} if ancestry else {}),
    }
    if progress:
        for line in data.summary():
            print(f"{recipe.name}: {line}", file=sys.stderr, flush=True)
    return Setup(
        train=train.to(device),
        valid=data.valid.to(device),
        test=None if data.test is None else data.test.to(device),
        start=data.start(),
        potential=potential,
        average=copy.deepcopy(potential),
        stress=train.has("stress"),
        device=device,
        header=header,
        identity={"recipe": _identity(recipe, resolved), "data_sha256": data.sha256, "ancestry": ancestry},
    )


def _identity(recipe: Recipe, resolved: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe must be the same at a resume: all but where it runs, in what pieces, and what it reports."""
    free = ("checkpoint", "device", "logging", "n_threads")
    if recipe.schedule.kind in EXTENDABLE and not _depends_on_length(recipe):
        free += ("epochs", "max_minutes", "steps")  # elsewhere, another length would wind the schedule back
    kept = {key: value for key, value in resolved.items() if key not in free}
    for section, names in (("batch", ("max_edges_per_pass",)), ("validation", ("max_edges", "symmetry_frames"))):
        kept[section] = {name: value for name, value in kept[section].items() if name not in names}
    # As stated: energies that are measured follow from the data and the ancestry, in the last digits from the machine.
    stated = recipe.isolated_atom_energies()
    table = None if stated is None else {chemical_symbols[z]: energy for z, energy in stated.items()}
    return {**kept, "data": {**kept["data"], "isolated_atom_energies": table}}


def _depends_on_length(recipe: Recipe) -> bool:
    """Whether anything but the learning rate follows the part of the training that is done."""
    falls = recipe.denoising is not None and recipe.denoising.final < 1
    return recipe.pretraining is not None or falls or bool(recipe.loss.all_stages)


def device_name(device: torch.device) -> str:
    """What the ledger calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from equimd.results import provenance

    return provenance().processor or f"{platform.machine()} ({os.cpu_count()} cores)"


@contextmanager
def threads(n_threads: int | None) -> Iterator[None]:
    """Run with torch's thread count set, and set it back."""
    before = torch.get_num_threads()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
