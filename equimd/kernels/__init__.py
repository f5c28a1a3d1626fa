"""The equivariant convolution, one operation closed under differentiation."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

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

Backend = Literal["auto", "reference", "numba"]
"""Of one convolution. Where whole networks are concerned, "auto" fuses them if their weights are frozen."""

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
        backend: "auto" is numba for float32 and float64 on the CPU where it can be imported, else the reference.
        topology: ``make_topology(senders, receivers, num_nodes, N)``, to sort the edges once for many calls; its edges
            are the ones that count.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit the plan or each other.
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
    if _choose(backend, x) == "reference":
        return convolve_reference(x, sh, radial, senders, receivers, plan, n_receivers)
    from equimd.kernels.numba_cpu import convolve_numba

    if topology is None:
        topology = make_topology(senders, receivers, n_receivers, x.shape[0])
    return convolve_numba(x, sh, radial, plan, topology)


def _choose(backend: Backend, x: Tensor) -> str:
    """The backend that will run: "reference" or "numba"."""
    backend = _chosen.get() if backend == "auto" else backend
    if backend == "reference":
        return backend
    if backend not in ("auto", "numba"):
        raise ValueError(f'backend must be "auto", "reference" or "numba", got {backend!r}')
    supported = x.device.type == "cpu" and x.dtype in _COMPILED
    if backend == "numba" and not supported:
        raise ValueError(f"the numba backend takes float32 and float64 on the CPU, got {x.dtype} on {x.device}")
    return "numba" if supported and (backend == "numba" or _has_numba()) else "reference"


def fuses(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether whole networks of frozen weights are compiled: with "auto", on the CPU, in float32 or float64."""
    return _chosen.get() == "auto" and device.type == "cpu" and dtype in _COMPILED and _has_numba()


@functools.cache
def _has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


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
