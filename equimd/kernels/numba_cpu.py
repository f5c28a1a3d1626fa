"""The convolution on the CPU, compiled by numba, without per-edge messages in memory.

Φ(x, Y, w, g) = Σ g·(w ⊙ (x ⊗ Y)) is linear in each of its four arguments. ``_Convolve`` is ∂Φ/∂g, ``_Gradient`` the
other three partial derivatives; the backward of each is made of both, so derivatives of any order are of these two.
"""

from typing import Any

import torch
from torch import Tensor

from equimd.kernels.compiled import get_kernel
from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.threads import WORK_PER_THREAD, run_ranges
from equimd.kernels.topology import Topology

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def convolve_numba(x: Tensor, sh: Tensor, radial: Tensor, plan: ConvolutionPlan, topology: Topology) -> Tensor:
    """``out[n, path] = Σ_{e into n} radial[e, path] · CG_path(x[sender], sh[e])``, (N, D_out, C).

    x (N, D_in, C); sh (E, (l_max_sh+1)²); radial (E, P, C). The result does not depend on the number of threads, which
    is ``torch.get_num_threads()`` at most.
    """
    return _Convolve.apply(x, sh, radial, plan, topology)  # pyright: ignore[reportReturnType]


class _Convolve(torch.autograd.Function):
    """∂Φ/∂g as a function of (x, Y, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, w: Tensor, plan: ConvolutionPlan, topology: Topology) -> Tensor:
        x, y, w = x.contiguous(), y.contiguous(), w.contiguous()
        ctx.save_for_backward(x, y, w)
        ctx.plan, ctx.topology = plan, topology
        out = x.new_empty(topology.n_receivers, plan.dim_out, x.shape[2])
        _run("forward", x, y, w, out, out, out, plan, topology)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, w = ctx.saved_tensors
        grads = _Gradient.apply(x, y, w, g, ctx.plan, ctx.topology, tuple(ctx.needs_input_grad[:3]))
        return (*grads, None, None)


class _Gradient(torch.autograd.Function):
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
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, y, w, g = x.contiguous(), y.contiguous(), w.contiguous(), g.contiguous()
        ctx.save_for_backward(x, y, w, g)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.topology = plan, topology
        gx, gy, gw = (torch.empty_like(t) if want else None for t, want in zip((x, y, w), wanted, strict=True))
        if gx is not None:
            _run("grad_x", x, y, w, g, gx, gx, plan, topology)
        if gy is not None and gw is not None:
            _run("grad_yw", x, y, w, g, gy, gw, plan, topology)
        elif gy is not None:
            _run("grad_y", x, y, w, g, gy, gy, plan, topology)
        elif gw is not None:
            _run("grad_w", x, y, w, g, gw, gw, plan, topology)
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
                grads[:3] = _Gradient.apply(*args, g, ctx.plan, ctx.topology, wanted)  # pyright: ignore
            if need_g:
                grads[3] = _Convolve.apply(*args, ctx.plan, ctx.topology)  # pyright: ignore
            totals = [b if a is None else a if b is None else a + b for a, b in zip(totals, grads, strict=True)]
        return (*totals, None, None, None)


def _run(
    kind: str,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    g: Tensor,
    out: Tensor,
    out2: Tensor,
    plan: ConvolutionPlan,
    topology: Topology,
) -> None:
    """Fill ``out`` (and ``out2``) by the kernel, in parts of about equally many edges."""
    n_channels = x.shape[2]
    if topology.n_edges == 0 or n_channels == 0 or plan.n_paths == 0:
        out.zero_()
        out2.zero_()
        return
    kernel = get_kernel(kind, plan, n_channels, _DTYPES[x.dtype])
    n_threads = min(torch.get_num_threads(), topology.n_edges * n_channels * plan.n_terms // WORK_PER_THREAD)
    if kind == "grad_x":  # each thread has senders of its own to write to
        out.zero_()
        order, bounds = topology.sender_groups(max(1, n_threads))
    else:
        order, bounds = topology.receiver_order, topology.split(max(1, n_threads))
    tensors = (x, y, w, g, out, out2, order, topology.senders, topology.receivers, topology.receiver_ptr)
    run_ranges(kernel, [tensor.data_ptr() for tensor in tensors], bounds)
