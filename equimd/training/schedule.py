"""The learning rate along a training: linear warm-up over the first steps, times a factor of lr by its kind.

With t the part of the training that is done and f = schedule.final, the factor is

    cosine     f + (1 − f) (1 + cos πt)/2
    linear     1 − (1 − f) t
    constant   1
    wsd        1, and linear from 1 to f over the last ``decay_fraction`` (Hägele et al. 2024, arXiv:2405.18392)
    plateau    1, times ``factor`` after ``patience`` validations in a row without a better metric; f at the least

A training of kind constant, wsd or plateau may be resumed with more steps, epochs or minutes than it began with: until
the decay of wsd begins, nothing that was done depends on the length, unless the recipe has pretraining, denoising whose
weight falls, or weights of the loss that change.
"""

import math
from collections.abc import Iterable

from torch.optim import Optimizer

from equimd.training.sections import ScheduleSection
from equimd.training.state import Progress

EXTENDABLE = ("constant", "wsd", "plateau")


def learning_rate_factor(section: ScheduleSection, step: int, progress: float, reduced: float = 1.0) -> float:
    """What multiplies lr at ``step`` (from 0) and at ``progress`` (0 to 1); ``reduced`` is ``Progress.reduced``."""
    warm = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    t, final = min(1.0, progress), section.final
    if section.kind == "cosine":
        return warm * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * t)))
    if section.kind == "constant":
        return warm
    if section.kind == "plateau":
        return warm * max(final, reduced)
    decay = 1.0 if section.kind == "linear" else section.decay_fraction
    return warm * (1.0 - (1.0 - final) * max(0.0, 1.0 - (1.0 - t) / decay))


def after_validation(section: ScheduleSection, progress: Progress, improved: bool) -> None:
    """Count validations and reduce the learning rate on a plateau; ``progress`` is changed."""
    progress.waited = 0 if improved else progress.waited + 1
    if section.kind == "plateau" and progress.waited >= section.patience:
        progress.reduced, progress.waited = progress.reduced * section.factor, 0


def set_learning_rate(optimizers: Iterable[Optimizer], factor: float) -> float:
    """Set lr = factor · base lr everywhere; returns that of the first group."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = factor * group["base_lr"]
    return groups[0]["lr"]
