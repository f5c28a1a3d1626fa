"""What the frozen networks of both families take and return."""

from typing import NamedTuple

import torch
from torch import Tensor

from equimd.kernels.topology import Topology

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Geometry(NamedTuple):
    """positions (N, 3), shifts (E, 3) in lattice vectors, cell (S, 3, 3), all float64; batch (N,) int64."""

    positions: Tensor
    shifts: Tensor
    cell: Tensor
    batch: Tensor


class Evaluation(NamedTuple):
    """output (N,) float64 of the network; repulsion (N,) eV; forces (N, 3) eV/Å and virial (S, 3, 3) eV, float64.

    Forces and virial are those of Σ seed · output + repulsion, the virial Σ r ⊗ ∂E/∂r.
    """

    output: Tensor
    repulsion: Tensor
    forces: Tensor
    virial: Tensor


def make_evaluation(n_atoms: int, n_systems: int) -> Evaluation:
    """Room for the results; sums start at zero."""
    doubles = {"dtype": torch.float64, "device": "cpu"}
    return Evaluation(
        output=torch.empty(n_atoms, **doubles),
        repulsion=torch.zeros(n_atoms, **doubles),
        forces=torch.zeros(n_atoms, 3, **doubles),
        virial=torch.zeros(n_systems, 3, 3, **doubles),
    )


def check_inputs(geometry: Geometry, kind: Tensor, topology: Topology) -> None:
    """Raise ValueError for arrays that do not fit the topology, or are not contiguous, of their type and on the CPU."""
    n, n_edges, n_systems = topology.n_receivers, topology.n_edges, geometry.cell.shape[0]
    wanted = {"positions": (n, 3), "shifts": (n_edges, 3), "cell": (n_systems, 3, 3), "batch": (n,), "kind": (n,)}
    for name, tensor in (*geometry._asdict().items(), ("kind", kind)):
        dtype = torch.int64 if name in ("batch", "kind") else torch.float64
        if (tensor.shape, tensor.dtype, tensor.device.type) != (wanted[name], dtype, "cpu"):
            raise ValueError(
                f"{name} must be {wanted[name]} {dtype} on the CPU, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if n and int(geometry.batch.max()) >= n_systems:
        raise ValueError(f"batch must be below the number of cells, {n_systems}, got {int(geometry.batch.max())}")
