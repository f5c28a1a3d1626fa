"""Optimisers, the schedule of learning rates, gradient clipping and the average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from equimd.training.sections import OptimizerSection, ScheduleSection


def make_optimizers(potential: nn.Module, section: OptimizerSection) -> list[Optimizer]:
    """AdamW for everything, or Muon for hidden matrices and AdamW for the rest.

    Muon (Jordan et al. 2024) as in torch, with steps rescaled to the RMS of AdamW's so that one lr suits both.
    Each group remembers its base learning rate as ``base_lr``.
    """
    named = [(name, p) for name, p in potential.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if section.name == "muon" and _is_hidden_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    decayed = [p for _, p in named if id(p) not in chosen and p.ndim >= 2]
    plain = [p for _, p in named if id(p) not in chosen and p.ndim < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, section.weight_decay), (plain, 0.0))
        if params
    ]
    optimizers: list[Optimizer] = []
    if groups:
        optimizers.append(AdamW(groups, lr=section.lr, betas=section.betas, fused=True))
    if matrices:
        from torch.optim import Muon  # torch 2.9 and later

        lr = section.muon_lr or section.lr
        optimizers.append(Muon(matrices, lr=lr, weight_decay=section.weight_decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) > 1 and "embedding" not in name


def learning_rate_factor(section: ScheduleSection, step: int, progress: float) -> float:
    """What multiplies lr at ``step`` (from 0) and at ``progress`` (0 to 1) of the training."""
    warm = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm * (section.final + (1.0 - section.final) * cosine)


def set_learning_rate(optimizers: Iterable[Optimizer], factor: float) -> float:
    """Set lr = factor · base lr everywhere; returns that of the first group."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = factor * group["base_lr"]
    return groups[0]["lr"]


class WeightAverage:
    """Exponential moving average of the parameters, held in a second copy of the potential.

    The decay grows as (1 + t)/(10 + t) up to its final value, so that the first weights are soon forgotten.
    """

    def __init__(self, source: nn.Module, average: nn.Module, decay: float) -> None:
        self.decay = decay
        self.source = [p for p in source.parameters() if p.requires_grad]
        self.average = [p for p, q in zip(average.parameters(), source.parameters(), strict=True) if q.requires_grad]
        for p in average.parameters():
            p.requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.source, 1.0 - decay)  # pyright: ignore


def gradient_norm(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Norm of the gradient; scaled down to ``limit`` where it is larger."""
    return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit, foreach=True)
