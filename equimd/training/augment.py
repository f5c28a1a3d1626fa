"""Random rotations of a batch: positions, cell, forces and stress together.

The rotation of a frame follows from (seed, epoch, frame, copy), not from a generator that runs along, so that a
resumed training sees the same frames.
"""

import numpy as np
import torch
from torch import Tensor

from equimd.graph import AtomGraph
from equimd.rotations import rotate_tensor, rotate_vectors

_STREAM = 0x0303  # keeps these numbers apart from those that shuffle


def epoch_rotations(n_frames: int, copies: int, seed: int, epoch: int, inversion: bool) -> np.ndarray:
    """Rotations (n_frames, copies, 3, 3), uniform on O(3) (on SO(3) without ``inversion``).

    Uniform unit quaternions from normal numbers; frame k's depend on (seed, epoch, k) whatever ``n_frames`` is.
    """
    rng = np.random.default_rng([_STREAM, seed, epoch])
    draws = rng.standard_normal((n_frames, copies, 5))
    w, x, y, z = np.moveaxis(draws[..., :4] / np.linalg.norm(draws[..., :4], axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    rotations = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    if inversion:
        rotations *= np.where(draws[..., 4] < 0, -1.0, 1.0)[..., None, None]
    return rotations


def rotate_graph(graph: AtomGraph, rotations: Tensor) -> AtomGraph:
    """The batch with structure s rotated by ``rotations[s]`` (S, 3, 3); edges stay, they are rotation-invariant.

    A stress of which only some components are known has none that are known after a rotation. Where there are such,
    the batch also holds ``rotations`` and the ``unrotated_stress``, for a prediction that is rotated back.
    """
    per_atom = rotations[graph.batch]
    rotated = AtomGraph(
        positions=rotate_vectors(graph.positions.unsqueeze(1), per_atom).squeeze(1),
        atomic_numbers=graph.atomic_numbers,
        edge_index=graph.edge_index,
        edge_shifts=graph.edge_shifts,
        cell=rotate_vectors(graph.cell, rotations),
        pbc=graph.pbc,
        energy=graph.energy,
        forces=rotate_vectors(graph.forces.unsqueeze(1), per_atom).squeeze(1),
        stress=rotate_tensor(graph.stress, rotations),
        batch=graph.batch,
    )
    rotated.n_systems = graph.n_systems
    missing = torch.isnan(graph.stress).flatten(1)
    if bool((missing.any(dim=1) & ~missing.all(dim=1)).any()):
        rotated.rotations, rotated.unrotated_stress = rotations, graph.stress
    return rotated


def rotate_all(graph: AtomGraph, rotation: Tensor) -> AtomGraph:
    """The batch with every structure rotated by the same ``rotation`` (3, 3)."""
    return rotate_graph(graph, rotation.expand(graph.n_systems, 3, 3).to(torch.float64))
