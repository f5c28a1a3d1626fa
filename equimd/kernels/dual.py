"""The convolution of dual numbers on the CPU: values and rates of change in one pass, differentiable once.

What training on forces needs: the gradient of Σ c·∂E/∂r with respect to the weights, for given c, is that of the rate
of change of E along c. It takes one pass forward and one back, where autograd would differentiate a gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equimd.kernels import dual_codegen
from equimd.kernels.compiled import compile_kernel
from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.threads import WORK_PER_THREAD, get_num_threads, run_ranges
from equimd.kernels.topology import Topology

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def convolve_dual(x: Tensor, sh: Tensor, radial: Tensor, plan: ConvolutionPlan, topology: Topology) -> Tensor:
    """``convolve`` of values, and its rate of change, (N, 2, D_out, C); rows in the order of ``dual_codegen.row_of``.

    x (N, 2, D_in, C), sh (E, 2, (l_max_sh+1)²) and radial (E, 2, P, C) hold values and rates of change. Differentiable
    once in x and radial; sh is a constant.

    Raises:
        ValueError: for shapes or dtypes that do not fit the plan or each other.
    """
    n_edges, n_channels = topology.n_edges, x.shape[-1]
    wanted = {
        "x": (x, (topology.n_senders, 2, plan.dim_in, n_channels)),
        "sh": (sh, (n_edges, 2, plan.dim_sh)),
        "radial": (radial, (n_edges, 2, plan.n_paths, n_channels)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device.type != "cpu":
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be {shape} {x.dtype} on the CPU, got {got}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32 or float64, got {x.dtype}")
    return _Convolve.apply(x, sh, radial, plan, topology)  # pyright: ignore[reportReturnType]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sh: Tensor, w: Tensor, plan: ConvolutionPlan, topology: Topology) -> Tensor:
        arrays = {"x": x.contiguous(), "sh": sh.contiguous(), "w": w.contiguous()}
        ctx.save_for_backward(*arrays.values())
        ctx.plan, ctx.topology = plan, topology
        arrays["out"] = x.new_empty(topology.n_receivers, 2, plan.dim_out, x.shape[-1])
        _run("forward", arrays, plan, topology, "out")
        return arrays["out"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, sh, w = ctx.saved_tensors
        need_x, _, need_w = ctx.needs_input_grad[:3]
        arrays = {"x": x, "sh": sh, "w": w, "g": g.contiguous(), "g_x": torch.empty_like(x), "g_w": torch.empty_like(w)}
        for name, needed in (("grad_x", need_x), ("grad_w", need_w)):
            if needed:
                _run(name, arrays, ctx.plan, ctx.topology, name.replace("grad", "g"))
        return arrays["g_x"] if need_x else None, None, arrays["g_w"] if need_w else None, None, None


def _run(name: str, arrays: dict[str, Tensor], plan: ConvolutionPlan, topology: Topology, result: str) -> None:
    n_channels = arrays["x"].shape[-1]
    if topology.n_edges == 0 or arrays[result].numel() == 0:
        arrays[result].zero_()
        return
    kernel, names = _kernel(name, plan, n_channels, _DTYPES[arrays["x"].dtype])
    n_threads = min(get_num_threads(), 3 * topology.n_edges * n_channels * plan.n_terms // WORK_PER_THREAD)
    if name == "grad_x":  # each thread has senders of its own to write to
        arrays[result].numpy().fill(0)  # not by torch: its threads would spin on beside ours
        order, bounds = topology.sender_groups(max(1, n_threads))
    else:
        order, bounds = topology.receiver_order, topology.split(max(1, n_threads))
    edges = {"order": order, "senders": topology.senders, "receivers": topology.receivers}
    held = arrays | edges | {"ptr": topology.receiver_ptr}
    run_ranges(kernel, [held[n].data_ptr() for n in names], bounds)


@functools.lru_cache(maxsize=256)
def _kernel(
    name: str, plan: ConvolutionPlan, n_channels: int, dtype: str
) -> tuple[Callable[..., None], tuple[str, ...]]:
    source = getattr(dual_codegen, f"{name}_source")(plan, n_channels, dtype)
    return compile_kernel(source.text, len(source.arguments), source.modules), source.arguments
