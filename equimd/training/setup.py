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
from ase.data import chemical_symbols

from equimd.errors import InputError
from equimd.models.checkpoint import build_potential
from equimd.models.equivariant import EquivariantSettings
from equimd.models.potential import Potential
from equimd.models.selfcheck import check_training_kernels
from equimd.training.data import FrameSet
from equimd.training.dataset import read_data
from equimd.training.recipe import Recipe


@dataclass
class Setup:
    """What a training works with; ``average`` holds the averaged weights and starts equal to ``potential``."""

    train: FrameSet
    valid: FrameSet
    test: FrameSet | None
    potential: Potential
    average: Potential
    stress: bool
    device: torch.device
    header: dict[str, Any]
    identity: dict[str, Any]


def prepare(recipe: Recipe, progress: bool = False) -> Setup:
    """Read the data, build the potential from the recipe's seed, scale it with the statistics of the training set."""
    device = _device(recipe.device)
    data = read_data(recipe, progress)
    train, numbers = data.train, data.statistics
    energies = {z: data.atoms.energies[z] for z in train.species}
    settings = recipe.model
    if isinstance(settings, EquivariantSettings) and settings.avg_num_neighbors is None:
        settings = settings.model_copy(update={"avg_num_neighbors": round(max(numbers.mean_neighbors, 1e-3), 6)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        potential = build_potential(settings, train.species, energies)
    potential.set_scale_shift({z: numbers.force_rms for z in train.species}, numbers.shift)
    potential = potential.to(device=device, dtype=getattr(torch, recipe.dtype))
    check_training_kernels(potential)
    resolved = recipe.model_dump(mode="json")
    resolved["model"] = settings.model_dump(mode="json")
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
    }
    free = ("checkpoint", "device", "max_minutes", "n_threads")  # may change between sessions
    identity = {
        "recipe": {key: value for key, value in resolved.items() if key not in free},
        "data_sha256": data.sha256,
    }
    if progress:
        for line in data.summary():
            print(f"{recipe.name}: {line}", file=sys.stderr, flush=True)
    return Setup(
        train=train.to(device),
        valid=data.valid.to(device),
        test=None if data.test is None else data.test.to(device),
        potential=potential,
        average=copy.deepcopy(potential),
        stress=train.has("stress"),
        device=device,
        header=header,
        identity=identity,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}; accepted are auto, cpu, cuda, cuda:<index>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r} but there is no CUDA device here; cpu is accepted")
    return device


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
