"""The convolution and its derivatives as autograd functions, of whatever kernels compute them.

Φ(x, Y, w, g) = Σ g·(w ⊙ (x ⊗ Y)) is linear in each of its four arguments. ``Convolve`` is ∂Φ/∂g, ``Gradient`` the
other three partial derivatives; the backward of each is made of both, so derivatives of any order are of these two.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.topology import Topology


class Run(Protocol):
    """The kernels of one backend."""

    def __call__(
        self,
        kind: str,
        x: Tensor,
        y: Tensor,
        w: Tensor,
        g: Tensor,
        out: Tensor,
        out2: Tensor,
        plan: ConvolutionPlan,
        topology: Topology,
        /,
    ) -> None:
        """Fill ``out``, and for "grad_yw" ``out2``, with a derivative; ``kind`` is one of ``codegen.KINDS``.

        x (N, D_in, C), y (E, (l_max_sh+1)²), w (E, P, C), g (N, D_out, C), contiguous; an output has the shape of what
        is derived by. Any tensor stands for what a kind does not use.
        """
        ...


class Convolve(torch.autograd.Function):
    """∂Φ/∂g as a function of (x, Y, w), (N, D_out, C)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, w: Tensor, plan: ConvolutionPlan, topology: Topology, run: Run
    ) -> Tensor:
        """The convolution itself."""
        x, y, w = x.contiguous(), y.contiguous(), w.contiguous()
        ctx.save_for_backward(x, y, w)
        ctx.rest = plan, topology, run
        out = x.new_empty(topology.n_receivers, plan.dim_out, x.shape[2])
        run("forward", x, y, w, out, out, out, plan, topology)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of Φ(x, Y, w, g) by x, Y and w."""
        x, y, w = ctx.saved_tensors
        grads = Gradient.apply(x, y, w, g, *ctx.rest, tuple(ctx.needs_input_grad[:3]))
        return (*grads, None, None, None)


class Gradient(torch.autograd.Function):
    """(∂Φ/∂x, ∂Φ/∂Y, ∂Φ/∂w) as functions of (x, Y, w, g); None for those that are not ``wanted``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        w: Tensor,
        g: Tensor,
        plan: ConvolutionPlan,
        topology: Topology,
        run: Run,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients, those by Y and by w in one pass over the edges."""
        x, y, w, g = x.contiguous(), y.contiguous(), w.contiguous(), g.contiguous()
        ctx.save_for_backward(x, y, w, g)
        ctx.set_materialize_grads(False)
        ctx.rest = plan, topology, run
        gx, gy, gw = (torch.empty_like(t) if want else None for t, want in zip((x, y, w), wanted, strict=True))
        if gx is not None:
            run("grad_x", x, y, w, g, gx, gx, plan, topology)
        if gy is not None and gw is not None:
            run("grad_yw", x, y, w, g, gy, gw, plan, topology)
        elif gy is not None:
            run("grad_y", x, y, w, g, gy, gy, plan, topology)
        elif gw is not None:
            run("grad_w", x, y, w, g, gw, gw, plan, topology)
        return gx, gy, gw

    @staticmethod
    def backward(ctx: Any, hx: Tensor | None, hy: Tensor | None, hw: Tensor | None) -> tuple[Tensor | None, ...]:
        """Derivatives of Φ(hx, Y, w, g) + Φ(x, hY, w, g) + Φ(x, Y, hw, g)."""
        x, y, w, g = ctx.saved_tensors
        need_x, need_y, need_w, need_g = ctx.needs_input_grad[:4]
        totals: list[Tensor | None] = [None, None, None, None]
        for args, wanted in (
            ((hx, y, w), (False, need_y, need_w)),
            ((x, hy, w), (need_x, False, need_w)),
            ((x, y, hw), (need_x, need_y, False)),
        ):
            if any(arg is None for arg in args):
                continue
            grads: list[Tensor | None] = [None, None, None, None]
            if any(wanted):
                grads[:3] = Gradient.apply(*args, g, *ctx.rest, wanted)  # pyright: ignore
            if need_g:
                grads[3] = Convolve.apply(*args, *ctx.rest)  # pyright: ignore
            totals = [b if a is None else a if b is None else a + b for a, b in zip(totals, grads, strict=True)]
        return (*totals, None, None, None, None)
