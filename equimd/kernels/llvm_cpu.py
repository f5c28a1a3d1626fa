"""The convolution on the CPU, compiled by LLVM, without per-edge messages in memory."""

import torch
from torch import Tensor

from equimd.kernels.closure import Convolve
from equimd.kernels.compiled import get_kernel
from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.threads import WORK_PER_THREAD, get_num_threads, run_ranges
from equimd.kernels.topology import Topology

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def convolve_llvm(x: Tensor, sh: Tensor, radial: Tensor, plan: ConvolutionPlan, topology: Topology) -> Tensor:
    """``out[n, path] = Σ_{e into n} radial[e, path] · CG_path(x[sender], sh[e])``, (N, D_out, C).

    x (N, D_in, C); sh (E, (l_max_sh+1)²); radial (E, P, C). The result does not depend on the number of threads, which
    is ``get_num_threads()`` at most.
    """
    return Convolve.apply(x, sh, radial, plan, topology, _run)  # pyright: ignore[reportReturnType]


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
    n_threads = min(get_num_threads(), topology.n_edges * n_channels * plan.n_terms // WORK_PER_THREAD)
    if kind == "grad_x":  # each thread has senders of its own to write to
        out.numpy().fill(0)  # not by torch: its threads would spin on beside ours
        order, bounds = topology.sender_groups(max(1, n_threads))
    else:
        order, bounds = topology.receiver_order, topology.split(max(1, n_threads))
    tensors = (x, y, w, g, out, out2, order, topology.senders, topology.receivers, topology.receiver_ptr)
    run_ranges(kernel, [tensor.data_ptr() for tensor in tensors], bounds)
