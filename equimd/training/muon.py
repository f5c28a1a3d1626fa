"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), all matrices of a shape at once.

    B ← μ B + (1 − μ) G,   U = (1 − μ) G + μ B,   W ← (1 − η λ) W − 0.2 η √max(m, n) · orth(U)

for a matrix W (m, n) with gradient G: steps of the RMS that AdamW's have (Liu et al. 2025, arXiv:2502.16982), so that
one learning rate suits both. It is ``torch.optim.Muon`` with adjust_lr_fn="match_rms_adamw", except that this one works
in the precision of the matrices, where that one works in bfloat16 and matrix by matrix: small networks spent a quarter
of their training on it, and rounding to bfloat16 makes of differences of 1e-16 ones of 1e-3.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

A, B, C = 3.4445, -4.7750, 2.0315
"""X ← (A + B XXᵀ + C (XXᵀ)²) X moves singular values between 0 and 1 to between 0.7 and 1.2 (Jordan et al. 2024)."""
STEPS = 5


class Muon(Optimizer):
    """For matrices; those without a gradient are left alone.

    ``blocks``: (dim, n) of a matrix that is n matrices side by side along ``dim``, each orthogonalised by itself.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        blocks: Mapping[nn.Parameter, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._blocks = dict(blocks or {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients; the ``closure`` of other optimisers is not used."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])  # pyright: ignore
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])  # pyright: ignore
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])  # pyright: ignore
            self._move(params, list(updates), group["lr"])

    def _move(self, params: list[nn.Parameter], updates: list[Tensor], lr: float) -> None:
        """Subtract the orthogonalised updates."""
        targets, sources = [], []
        for p, update in zip(params, updates, strict=True):
            dim, n = self._blocks.get(p, (0, 1))
            targets += p.chunk(n, dim)
            sources += update.chunk(n, dim)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for k, update in enumerate(sources):
            if update.shape[0] > update.shape[1]:
                targets[k], sources[k] = targets[k].T, update.T
            by_shape.setdefault(tuple(sources[k].shape), []).append(k)
        for (_, longer), members in by_shape.items():
            steps = orthogonalize(torch.stack([sources[k] for k in members]))
            along = [targets[k] for k in members]
            torch._foreach_add_(along, steps.unbind(), alpha=-0.2 * lr * math.sqrt(longer))  # pyright: ignore


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ (K, m, n), m ≤ n."""
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
