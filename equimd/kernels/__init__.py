"""The equivariant convolution, one operation closed under differentiation."""

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

from equimd.kernels.plan import (
    ConvolutionPlan,
    Irrep,
    OutputBlock,
    Path,
    irreps_dim,
    make_layer_plan,
    make_plan,
    standard_irreps,
)
from equimd.kernels.reference import convolve_reference
from equimd.kernels.topology import Topology, make_topology

__all__ = [
    "Backend",
    "ConvolutionPlan",
    "Irrep",
    "OutputBlock",
    "Path",
    "Topology",
    "convolve",
    "fuses",
    "irreps_dim",
    "make_layer_plan",
    "make_plan",
    "make_topology",
    "standard_irreps",
    "using",
]

Backend = Literal["auto", "reference", "llvm", "triton"]
"""Of one convolution. Where whole networks are concerned, "auto" fuses them if their weights are frozen."""

_PACKAGES = {"llvm": "llvmlite", "triton": "triton"}
_COMPILED = (torch.float32, torch.float64)
_chosen: ContextVar[Backend] = ContextVar("_chosen", default="auto")


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Within this block, in this thread, "auto" means ``backend``; for checks of one backend against another."""
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def convolve(
    x: Tensor,
    sh: Tensor,
    radial: Tensor,
    senders: Tensor,
    receivers: Tensor,
    plan: ConvolutionPlan,
    num_nodes: int | None = None,
    backend: Backend = "auto",
    topology: Topology | None = None,
) -> Tensor:
    """``out[n, path] = Σ_{e into n} radial[e, path] · CG_path(x[sender], sh[e])``, (num_nodes, D_out, C).

    Differentiable to any order in ``x``, ``sh`` and ``radial`` with every backend.

    Args:
        x: Features (N, D_in, C).
        sh: Spherical harmonics (E, (l_max_sh+1)²), e3nn component normalisation.
        radial: Weights (E, P, C).
        senders: Row of ``x`` that each edge reads, (E,) int64.
        receivers: Row of the output that each edge writes, (E,) int64.
        plan: The layout, from ``make_plan``.
        num_nodes: Rows of the output; N unless given.
        backend: "auto" is llvm on the CPU and triton on a GPU where they can be imported (and triton compiles), for
            float32 and float64, else the reference.
        topology: ``make_topology(senders, receivers, num_nodes, N)``, to sort the edges once for many calls; its edges
            are the ones that count.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit the plan or each other, and for a backend that was
            asked for and is not installed.
    """
    n_receivers = x.shape[0] if num_nodes is None else num_nodes
    if topology is not None:
        senders, receivers = topology.senders, topology.receivers
        if (topology.n_senders, topology.n_receivers) != (x.shape[0], n_receivers):
            raise ValueError(
                f"topology is of {topology.n_senders} senders and {topology.n_receivers} receivers, "
                f"not of {x.shape[0]} and {n_receivers}"
            )
    _check(x, sh, radial, senders, plan)
    chosen = _choose(backend, x)
    if chosen == "reference":
        return convolve_reference(x, sh, radial, senders, receivers, plan, n_receivers)
    if topology is None:
        topology = make_topology(senders, receivers, n_receivers, x.shape[0])
    if chosen == "triton":
        from equimd.kernels.triton_gpu import convolve_triton

        return convolve_triton(x, sh, radial, plan, topology)
    from equimd.kernels.llvm_cpu import convolve_llvm

    return convolve_llvm(x, sh, radial, plan, topology)


def _choose(backend: Backend, x: Tensor) -> Backend:
    """The backend that will run, which is not "auto"."""
    backend = _chosen.get() if backend == "auto" else backend
    if backend == "reference":
        return backend
    compiled, device = x.dtype in _COMPILED, x.device.type
    if backend == "auto":
        if compiled and device == "cpu" and _has("llvm"):
            return "llvm"
        return "triton" if compiled and device == "cuda" and _has("triton") and _runs(x.device) else "reference"
    if backend == "llvm":
        if not (compiled and device == "cpu"):
            raise ValueError(f"the llvm backend takes float32 and float64 on the CPU, got {x.dtype} on {x.device}")
    elif backend == "triton":
        if not (compiled and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")):
            raise ValueError(f"the triton backend takes float32 and float64 on a GPU, got {x.dtype} on {x.device}")
    else:
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if not _has(backend):
        raise ValueError(f"the {backend} backend needs the package {_PACKAGES[backend]}, which is not installed")
    return backend


def fuses(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether whole networks of frozen weights are compiled: with "auto", on the CPU, in float32 or float64."""
    return _chosen.get() == "auto" and device.type == "cpu" and dtype in _COMPILED and _has("llvm")


@functools.cache
def _has(backend: Backend) -> bool:
    try:
        importlib.import_module(_PACKAGES[backend])
    except ImportError:
        return False
    return True


def _runs(device: torch.device) -> bool:
    """Whether triton compiles for this device."""
    from equimd.kernels.triton_gpu import runs

    return runs(device)


def _check(x: Tensor, sh: Tensor, radial: Tensor, senders: Tensor, plan: ConvolutionPlan) -> None:
    n_edges = senders.shape[0]
    if x.ndim != 3 or x.shape[1] != plan.dim_in:
        raise ValueError(f"x must be (N, {plan.dim_in}, C), got {tuple(x.shape)}")
    if tuple(sh.shape) != (n_edges, plan.dim_sh):
        raise ValueError(f"sh must be ({n_edges}, {plan.dim_sh}), got {tuple(sh.shape)}")
    if tuple(radial.shape) != (n_edges, plan.n_paths, x.shape[2]):
        raise ValueError(f"radial must be ({n_edges}, {plan.n_paths}, {x.shape[2]}), got {tuple(radial.shape)}")
    if not (x.dtype == sh.dtype == radial.dtype and x.device == sh.device == radial.device == senders.device):
        given = ", ".join(f"{t.dtype} on {t.device}" for t in (x, sh, radial, senders))
        raise ValueError(f"x, sh, radial must share dtype, and their device with the edges, got {given}")
