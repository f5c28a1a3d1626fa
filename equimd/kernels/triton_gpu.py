"""The convolution on a GPU, compiled by triton, without per-edge messages in memory.

With TRITON_INTERPRET=1 in the environment triton runs the same kernels on the CPU, number by number: for tests.
"""

import functools
import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor

from equimd.errors import KernelWarning
from equimd.kernels.cache import import_source
from equimd.kernels.closure import Convolve
from equimd.kernels.plan import ConvolutionPlan, make_layer_plan
from equimd.kernels.topology import Topology, make_topology
from equimd.kernels.triton_codegen import OPTIONS, kernel_source, n_parts

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def convolve_triton(x: Tensor, sh: Tensor, radial: Tensor, plan: ConvolutionPlan, topology: Topology) -> Tensor:
    """``out[n, path] = Σ_{e into n} radial[e, path] · CG_path(x[sender], sh[e])``, (N, D_out, C).

    x (N, D_in, C); sh (E, (l_max_sh+1)²); radial (E, P, C). The same to the last bit every time.
    """
    return Convolve.apply(x, sh, radial, plan, topology, _run)  # pyright: ignore[reportReturnType]


@functools.cache
def runs(device: torch.device) -> bool:
    """Whether triton can compile for this device and run there; tried once, with a warning where it cannot."""
    one = torch.ones(1, 1, 1, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            value = float(convolve_triton(one, one[0], one, make_layer_plan(0), make_topology(index, index, 1)))
    except torch.OutOfMemoryError:  # says nothing about triton
        raise
    except Exception as error:  # no C compiler, a GPU or a driver that triton does not know, ...
        fault = f"{type(error).__name__}: {error}"
    else:
        if value == 1.0:
            return True
        fault = f"1 · 1 · 1 is {value:g}"
    warnings.warn(
        f"triton does not work on {device} ({fault}); torch computes the convolutions instead, more slowly",
        KernelWarning,
        stacklevel=2,
    )
    return False


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
    """Fill ``out`` (and ``out2``) by the kernel, with as many programs for every node."""
    n_channels = x.shape[2]
    if topology.n_edges == 0 or n_channels == 0 or plan.n_paths == 0:
        out.zero_()
        out2.zero_()
        return
    kernel, parts = _kernel(kind, plan, n_channels, _DTYPES[x.dtype])
    if kind == "grad_x":
        edges = topology.sender_order, topology.receivers_by_sender, topology.sender_ptr
    else:
        edges = topology.receiver_order, topology.senders_by_receiver, topology.receiver_ptr
    summed = kind in ("grad_y", "grad_yw") and parts > 1
    to = out.new_empty(len(out), parts, out.shape[1]) if summed else out
    with torch.cuda.device_of(x):
        kernel[(len(edges[2]) - 1, parts)](x, y, w, g, to, out2, *edges, **OPTIONS)
    if summed:
        torch.sum(to, dim=1, out=out)


@functools.cache
def _kernel(kind: str, plan: ConvolutionPlan, n_channels: int, dtype: str) -> tuple[Any, int]:
    """The triton function and its programs per node; triton compiles it when it is called."""
    source = kernel_source(kind, plan, n_channels, dtype)
    module = import_source(source, f"_equimd_kernel_{hashlib.sha256(source.encode()).hexdigest()[:20]}")
    return module.kernel, n_parts(kind, plan, n_channels, dtype)
