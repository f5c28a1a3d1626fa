"""From a recipe to what the loop needs: frames, potential, the average of its weights, and the checkpoints' header."""

import copy
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from equimd.errors import InputError
from equimd.models.potential import Potential
from equimd.models.selfcheck import check_training_kernels
from equimd.training.data import FrameSet, build_frame_set, file_sha256, load_frames, statistics, subset
from equimd.training.initial import make_potential
from equimd.training.recipe import Recipe
from equimd.training.schedule import EXTENDABLE


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


def prepare(recipe: Recipe) -> Setup:
    """Read the data, make the potential that the recipe begins with."""
    device = _device(recipe.device)
    energies = recipe.isolated_atom_energies()
    sets, sha256 = {}, {}
    for split in ("train", "valid", "test"):
        relative = getattr(recipe.data, split)
        if relative is None:
            continue
        path = recipe.path(relative)
        frames = load_frames(path, recipe.data)
        sha256[relative] = file_sha256(path)
        if split == "train" and (chosen := subset(len(frames), recipe.data.n_train, recipe.seed)) is not None:
            frames = [frames[k] for k in chosen]
        sets[split] = build_frame_set(frames, recipe.model.cutoff, energies, str(path))
    train = sets["train"]
    _check_labels(recipe, train, sets["valid"])
    _check_species(sets, train)
    potential, ancestry = make_potential(recipe, train, energies, statistics(train, energies))
    potential = potential.to(device=device)
    check_training_kernels(potential)
    resolved = recipe.model_dump(mode="json")
    resolved["model"] = potential.settings.model_dump(mode="json")
    resolved["data"]["isolated_atom_energies"] = recipe.isolated_atom_energies_by_symbol()
    header = {
        "name": recipe.name,
        "recipe": resolved,
        "data_sha256": sha256,
        "n_train": len(train),
        "reference": recipe.data.reference,
        "charge": recipe.data.charge,
        "multiplicity": recipe.data.multiplicity,
        **({"ancestry": ancestry} if ancestry else {}),
    }
    free = ("checkpoint", "device", "max_minutes", "n_threads")  # may change between sessions
    if recipe.schedule.kind in EXTENDABLE:
        free += ("epochs", "steps")
    identity = {
        "recipe": {key: value for key, value in resolved.items() if key not in free},
        "data_sha256": sha256,
        "ancestry": ancestry,
    }
    return Setup(
        train=train.to(device),
        valid=sets["valid"].to(device),
        test=sets["test"].to(device) if "test" in sets else None,
        potential=potential,
        average=copy.deepcopy(potential),
        stress=train.has("stress"),
        device=device,
        header=header,
        identity=identity,
    )


def _check_labels(recipe: Recipe, train: FrameSet, valid: FrameSet) -> None:
    for term in ("energy", "forces", "stress"):
        weight = recipe.loss.largest(term)
        if weight > 0 and not train.has(term):
            raise InputError(
                f"loss.{term} is {weight:g} but {recipe.data.train} has no {term} labels; set it to 0 or name the"
                " labels in data.keys"
            )
    metric = recipe.validation.metric
    if not valid.has("forces" if metric.startswith("force") else "energy"):
        raise InputError(
            f"validation.metric is {metric!r} but {recipe.data.valid} has no such labels; accepted is one of"
            " force_mae, force_rmse, energy_mae, energy_rmse that it has labels for"
        )


def _check_species(sets: dict[str, FrameSet], train: FrameSet) -> None:
    for split, frames in sets.items():
        extra = sorted(set(frames.species) - set(train.species))
        if extra:
            raise InputError(f"data.{split} has atomic number {extra[0]}, which no training frame has")


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
