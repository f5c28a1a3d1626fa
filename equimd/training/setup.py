"""From a recipe to what the loop needs: frames, potential, the average of its weights, and the checkpoints' header."""

import copy
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equimd.errors import InputError
from equimd.models.checkpoint import build_potential
from equimd.models.equivariant import EquivariantSettings
from equimd.models.potential import Potential
from equimd.models.selfcheck import check_training_kernels
from equimd.training.data import FrameSet, build_frame_set, file_sha256, load_frames, statistics, subset
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


def prepare(recipe: Recipe, device: torch.device) -> Setup:
    """Read the data, build the potential from the recipe's seed, scale it with the statistics of the training set."""
    energies = recipe.isolated_atom_energies()
    sets, sha256 = {}, {}
    for split in ("train", "valid", "test"):
        relative = getattr(recipe.data, split)
        if relative is None:
            continue
        path = recipe.path(relative)
        frames = load_frames(path, recipe.data)
        sha256[relative] = file_sha256(path)
        if split == "train" and (chosen := _chosen(recipe, len(frames))) is not None:
            frames = [frames[k] for k in chosen]
        sets[split] = build_frame_set(frames, recipe.model.cutoff, energies, str(path))
    train = sets["train"]
    _check_labels(recipe, train)
    _check_species(sets, train)
    numbers = statistics(train, energies)
    settings = recipe.model
    if isinstance(settings, EquivariantSettings) and settings.avg_num_neighbors is None:
        settings = settings.model_copy(update={"avg_num_neighbors": round(max(numbers.mean_neighbors, 1e-3), 6)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        potential = build_potential(settings, train.species, {z: energies[z] for z in train.species})
    potential.set_scale_shift({z: numbers.force_rms for z in train.species}, numbers.shift)
    potential = potential.to(device=device, dtype=getattr(torch, recipe.dtype))
    check_training_kernels(potential)
    resolved = recipe.model_dump(mode="json")
    resolved["model"] = settings.model_dump(mode="json")
    resolved["data"]["isolated_atom_energies"] = recipe.isolated_atom_energies_by_symbol()
    header = {
        "name": recipe.name,
        "recipe": resolved,
        "data_sha256": sha256,
        "n_train": len(train),
        "reference": recipe.data.reference,
        "charge": recipe.data.charge,
        "multiplicity": recipe.data.multiplicity,
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
        identity={"recipe": _identity(resolved), "data_sha256": sha256},
    )


def _chosen(recipe: Recipe, n_frames: int) -> np.ndarray | None:
    seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    return subset(n_frames, recipe.data.n_train, seed)


def _identity(resolved: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe must be the same at a resume: all but where it runs, in what pieces, and what it reports."""
    free = ("checkpoint", "device", "logging", "max_minutes", "n_threads")
    kept = {key: value for key, value in resolved.items() if key not in free}
    for section, key in (("batch", "max_edges_per_pass"), ("validation", "max_edges")):
        kept[section] = {name: value for name, value in kept[section].items() if name != key}
    return kept


def _check_labels(recipe: Recipe, train: FrameSet) -> None:
    last = recipe.loss.last
    for term in ("energy", "forces", "stress"):
        weight = max(getattr(recipe.loss, term), getattr(last, term) if last else 0.0)
        if weight > 0 and not train.has(term):
            raise InputError(
                f"loss.{term} is {weight:g} but {recipe.data.train} has no {term} labels; set it to 0 or name the"
                " labels in data.keys"
            )


def _check_species(sets: dict[str, FrameSet], train: FrameSet) -> None:
    for split, frames in sets.items():
        extra = sorted(set(frames.species) - set(train.species))
        if extra:
            raise InputError(f"data.{split} has atomic number {extra[0]}, which no training frame has")


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
