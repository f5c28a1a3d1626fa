"""Optimisers, gradient clipping and the average of the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from equimd.models.potential import Potential
from equimd.training.muon import Muon
from equimd.training.sections import EMASection, OptimizerSection

_NOT_HIDDEN = ("embedding", "norm", "head")  # tables and first maps, gains, last maps


def make_optimizers(potential: nn.Module, section: OptimizerSection) -> list[Optimizer]:
    """AdamW for everything, or Muon for hidden matrices and AdamW for the rest; weights decay in matrices only.

    Frozen parameters are left out. Each group remembers its base learning rate as ``base_lr``.
    """
    named = [(name, p) for name, p in potential.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if section.name == "muon" and is_hidden_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    decayed = [p for name, p in named if id(p) not in chosen and _is_matrix(name, p)]
    plain = [p for name, p in named if id(p) not in chosen and not _is_matrix(name, p)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, section.weight_decay), (plain, 0.0))
        if params
    ]
    optimizers: list[Optimizer] = []
    if groups:
        optimizers.append(AdamW(groups, lr=section.lr, betas=section.betas, fused=True))
    if matrices:
        lr = section.muon_lr or section.lr
        fused = potential.fused_matrices() if section.muon_split and isinstance(potential, Potential) else {}
        blocks = {p: fused[name] for name, p in named if name in fused}
        optimizers.append(Muon(matrices, lr, section.muon_momentum, section.weight_decay, blocks))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for it: a matrix between hidden features, so neither embeddings nor read-outs nor gains."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and not any(word in name for word in _NOT_HIDDEN)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and "embedding" not in name and "norm" not in name


def zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Forget the gradients; without the bookkeeping of ``Optimizer.zero_grad``."""
    for parameter in parameters:
        parameter.grad = None


class WeightAverage:
    """Exponential moving average of the parameters, held in a second copy of the potential.

    After step t the average keeps min(decay, (1 + t)/(10 + t)) of itself, so that the first weights are soon forgotten;
    with ``fraction`` f it keeps (1 − 1/t)^(1/f − 1): then the mean age of what is averaged is f t at any time, whatever
    the length of the training (Karras et al. 2024, arXiv:2312.02696, eq. 1).
    """

    def __init__(self, source: nn.Module, average: nn.Module, section: EMASection) -> None:
        self.section = section
        self.source = [p for p in source.parameters() if p.requires_grad]
        self.average = [p for p, q in zip(average.parameters(), source.parameters(), strict=True) if q.requires_grad]
        for p in average.parameters():
            p.requires_grad_(False)

    def kept(self, step: int) -> float:
        """What the average keeps of itself after ``step`` (from 1)."""
        if self.section.fraction is not None:
            return (1.0 - 1.0 / step) ** (1.0 / self.section.fraction - 1.0)
        return min(self.section.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after ``step`` (from 1)."""
        torch._foreach_lerp_(self.average, self.source, 1.0 - self.kept(step))  # pyright: ignore


def gradient_norm(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """Norm of the gradient, which is scaled down to ``limit`` where it is larger; 0 where there is none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))  # pyright: ignore
    if limit is not None and norm > limit:
        torch._foreach_mul_(gradients, limit / norm)  # pyright: ignore
    return norm
