"""The state of a training, for a resume that continues bit for bit: tensors in safetensors, counters in its header."""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.optim import Optimizer

from equimd.errors import InputError
from equimd.models.container import read_tensors, write_tensors
from equimd.training.precision import PrecisionError
from equimd.training.recipe import Recipe

STATE_FILE = "state.safetensors"
FORMER_DEFAULTS: dict[str, dict[str, Any]] = {"loss": {"kind": "mse"}, "optimizer": {"name": "adamw", "lr": 2e-3}}
"""What recipes of version 0.1.0 and before meant by saying nothing, where it is something else now."""
FORMAT = "equimd-training-state"


class Progress(BaseModel):
    """Counters of a training; everything that the loop needs besides tensors.

    step counts optimiser steps done; the next batch is number ``batch`` of ``epoch``. The sums are of the loss terms
    since the last validation, each over ``n_sums`` steps that had labels for it. best is the metric of the best
    validation, ``stale`` the validations since, ``waited`` those since the learning rate was ``reduced``; rows are
    those of metrics.csv. hours are of the clock, device_hours those times the number of processes, cpu_hours the time
    of CPUs, None if it was not counted; shared says that the machine did other work; train_seconds are spent in steps,
    on frames_seen.
    """

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    epoch: int = 0
    batch: int = 0
    frames_seen: int = 0
    sums: list[float] = [0.0, 0.0, 0.0, 0.0, 0.0]
    n_sums: list[int] = [0, 0, 0, 0, 0]
    lr: float | None = None
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    reduced: float = 1.0
    waited: int = 0
    hours: float = 0.0
    device_hours: float = 0.0
    cpu_hours: float | None = None
    shared: bool = False
    train_seconds: float = 0.0
    sessions: int = 0
    rows: int = 0
    stopped: str | None = None
    precision_start: PrecisionError | None = None

    def become(self, other: "Progress") -> None:
        """Take the values of another."""
        for name in type(self).model_fields:
            setattr(self, name, getattr(other, name))


def keep_former_defaults(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe for a resume: where it is silent, the former default that the run in ``folder`` began with, if any."""
    path = folder / STATE_FILE
    if not path.exists():
        return recipe
    before = read_tensors(path, FORMAT)[0].get("identity", {}).get("recipe", {})
    changes = {}
    for name, former in FORMER_DEFAULTS.items():
        section, stored = getattr(recipe, name), before.get(name, {})
        silent = former.keys() - section.model_fields_set
        kept = {key: former[key] for key in silent if stored.get(key) == former[key]}
        changes[name] = section.model_copy(update=kept)
    return recipe.model_copy(update=changes)


def write_state(
    folder: Path,
    progress: Progress,
    identity: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizers: list[Optimizer],
) -> None:
    """Write everything to ``state.safetensors``; ``identity`` is what must be the same at a resume."""
    tensors = {
        f"{prefix}/{name}": tensor.detach().cpu().clone()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for k, optimizer in enumerate(optimizers):
        for n, parameter in enumerate(_parameters(optimizer)):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer{k}/{n}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
    header = {"progress": progress.model_dump(), "identity": identity}
    write_tensors(folder / STATE_FILE, FORMAT, header, tensors, finite=False)  # a metric may be NaN


def read_state(
    folder: Path, identity: dict[str, Any], modules: dict[str, nn.Module], optimizers: list[Optimizer]
) -> Progress | None:
    """Fill modules and optimisers from ``state.safetensors``; None where a training left none.

    Raises:
        InputError: for an unreadable file, or when ``identity`` is not what it was.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    header, tensors = read_tensors(path, FORMAT, finite=False)
    before = header.get("identity", {})
    if not isinstance(before, dict):
        raise InputError(f"{path} has an identity that is a {type(before).__name__}; accepted is an object")
    changed = [key for key in identity if before.get(key) != identity[key]]
    if changed:
        key = changed[0]
        raise InputError(f"cannot resume {folder}: {_difference(key, before.get(key), identity[key])}")
    try:
        for prefix, module in modules.items():
            own = {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
            module.load_state_dict(own)
        progress = Progress.model_validate(header["progress"])
    except (RuntimeError, KeyError, ValidationError) as error:
        raise InputError(f"{path} does not fit this recipe: {' '.join(str(error).split())[:200]}") from error
    for k, optimizer in enumerate(optimizers):
        for n, parameter in enumerate(_parameters(optimizer)):
            prefix = f"optimizer{k}/{n}/"
            own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            if any(value.numel() != 1 and value.shape != parameter.shape for value in own.values()):
                raise InputError(f"{path} does not fit this recipe: {prefix}* has not the shape of its parameter")
            if own:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in own.items()}
    return progress


def _difference(key: str, before: Any, now: Any) -> str:
    """The first entry in which two nested mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            if before.get(name) != now[name]:
                return _difference(f"{key}.{name}", before.get(name), now[name])
    return f"{key} was {before!r} and is now {now!r}"


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
