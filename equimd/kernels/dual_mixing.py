"""What a layer does to dual numbers between convolutions, on the CPU: linear maps, the linear skip, and the gate.

Rows of C channels lie as (N, 2, D, C): values and rates of change, (l, m) by (l, m). A linear map takes one row of all
atoms at a time, where it lies: nothing is copied between convolutions. Differentiable once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equimd.kernels import dual_gate_codegen
from equimd.kernels.compiled import compile_kernel
from equimd.kernels.dual_gate_codegen import dim_gated, n_gates, row_before_gate
from equimd.kernels.plan import ConvolutionPlan, Irrep, irreps_dim
from equimd.kernels.threads import WORK_PER_THREAD, get_num_threads, run_ranges

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_WORK = 20  # of a gate, in multiply-adds a number


def map_rows(x: Tensor, weights: Sequence[Tensor], irreps: Sequence[Irrep]) -> Tensor:
    """x (N, 2, D, C), the rows of each irrep times its matrix (C, C'), → (N, 2, D, C')."""
    return _MapRows.apply(x, tuple(irreps), *weights)  # pyright: ignore[reportReturnType]


def mix_and_gate(message: Tensor, x: Tensor, weights: Sequence[Tensor], plan: ConvolutionPlan) -> Tensor:
    """Gate(Linear([message, x])), (N, 2, D, C) of the plan's output irreps.

    message (N, 2, D_out, C) is ``convolve_dual``'s, x (N, 2, D_in, C) the input of the layer, weights a matrix per
    output irrep, (paths · C [+ C], C), for the even scalar with (1 + gates) · C columns.
    """
    return _MixAndGate.apply(message, x, plan, *weights)  # pyright: ignore[reportReturnType]


def _irrep_rows(irreps: Sequence[Irrep]) -> list[range]:
    """Rows of every irrep."""
    return [range(irreps_dim(irreps[:k]), irreps_dim(irreps[: k + 1])) for k in range(len(irreps))]


class _MapRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, irreps: tuple[Irrep, ...], *weights: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, *weights)
        ctx.irreps = irreps
        n, _, d, c = x.shape
        out = x.new_empty(n, 2, d, weights[0].shape[1])
        source, target = x.view(2 * n, d, c), out.view(2 * n, d, -1)
        for rows, weight in zip(_irrep_rows(irreps), weights, strict=True):
            for row in rows:
                torch.mm(source[:, row], weight, out=target[:, row])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        n, _, d, c = x.shape
        g_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        g_weights = [torch.zeros_like(weight) for weight in weights]
        source, given = x.view(2 * n, d, c), g.contiguous().view(2 * n, d, -1)
        for rows, weight, g_weight in zip(_irrep_rows(ctx.irreps), weights, g_weights, strict=True):
            for row in rows:
                g_weight.addmm_(source[:, row].T, given[:, row])
                if g_x is not None:
                    torch.mm(given[:, row], weight.T, out=g_x.view(2 * n, d, c)[:, row])
        return g_x, None, *g_weights


class _MixAndGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: Tensor, x: Tensor, plan: ConvolutionPlan, *weights: Tensor) -> Tensor:
        message, x = message.contiguous(), x.contiguous()
        n, c = x.shape[0], x.shape[3]
        z = x.new_empty(n, 2, dim_gated(plan.irreps_out), c)
        for to, m, skip, weight in _products(z, message, x, weights, plan):
            taken = m.shape[1]
            torch.mm(m, weight[:taken], out=to)
            if skip is not None:
                to.addmm_(skip, weight[taken:])
        y = x.new_empty(n, 2, irreps_dim(plan.irreps_out), c)
        _run("forward", plan.irreps_out, z, y)
        ctx.save_for_backward(message, x, z, *weights)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        message, x, z, *weights = ctx.saved_tensors
        plan: ConvolutionPlan = ctx.plan
        g_z, g_message, g_x = torch.empty_like(z), torch.empty_like(message), torch.zeros_like(x)
        _run("backward", plan.irreps_out, z, g.contiguous(), g_z)
        g_weights = [torch.zeros_like(weight) for weight in weights]
        here = _products(g_z, message, x, g_weights, plan)
        there = _products(g_z, g_message, g_x, weights, plan)
        for (given, m, skip, g_weight), (_, g_m, g_skip, weight) in zip(here, there, strict=True):
            taken = m.shape[1]
            g_weight[:taken].addmm_(m.T, given)
            torch.mm(given, weight[:taken].T, out=g_m)
            if skip is not None and g_skip is not None:
                g_weight[taken:].addmm_(skip.T, given)
                g_skip.addmm_(given, weight[taken:].T)
        return g_message, g_x, None, *g_weights


def _products(
    z: Tensor, message: Tensor, x: Tensor, weights: Sequence[Tensor], plan: ConvolutionPlan
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Views of every product, z = message @ W[:paths · C] + x @ W[paths · C:], row by row: z, message, x and W."""
    n = 2 * x.shape[0]
    z, message, x = z.view(n, *z.shape[2:]), message.view(n, *message.shape[2:]), x.view(n, *x.shape[2:])
    skips = dict(zip(plan.irreps_in, _irrep_rows(plan.irreps_in), strict=True))
    views = []
    for k, (block, weight) in enumerate(zip(plan.blocks, weights, strict=True)):
        width = 1 if k else 1 + n_gates(plan.irreps_out)
        to, skip = row_before_gate(plan.irreps_out, k), skips.get((block.l, block.p))
        for m in range(2 * block.l + 1):
            first = block.offset + m * block.n_paths
            views.append(
                (
                    z[:, to + m : to + m + width].flatten(1),
                    message[:, first : first + block.n_paths].flatten(1),
                    None if skip is None else x[:, skip[m]],
                    weight,
                )
            )
    return views


def _run(name: str, irreps: tuple[Irrep, ...], *arrays: Tensor) -> None:
    """The gate, or its derivative, of z and what belongs to y."""
    z = arrays[0]
    if z.numel() == 0:
        return
    kernel = _kernel(name, irreps, z.shape[3], _DTYPES[z.dtype])
    parts = max(1, min(get_num_threads(), _WORK * z.numel() // WORK_PER_THREAD))
    bounds = [z.shape[0] * k // parts for k in range(parts + 1)]
    run_ranges(kernel, [array.data_ptr() for array in arrays], bounds)


@functools.lru_cache(maxsize=256)
def _kernel(name: str, irreps: tuple[Irrep, ...], n_channels: int, dtype: str) -> Callable[..., None]:
    source = getattr(dual_gate_codegen, f"{name}_source")(irreps, n_channels, dtype)
    return compile_kernel(source.text, len(source.arguments))
