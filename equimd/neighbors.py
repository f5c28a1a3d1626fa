"""Neighbour lists: vesin behind one function, and a Verlet skin outside autograd."""

import numpy as np
from vesin import NeighborList

from equimd.errors import InputError


def neighbor_list(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Every directed pair within ``cutoff`` Å, periodic images included.

    positions (N, 3) Å, cell (3, 3) rows, pbc (3,) bool. Returns edge_index (2, E) int64 as [receiver, sender] and
    shifts (E, 3) int64 with r_ij = x_j − x_i + S_ij @ cell, sorted by receiver, then sender, then shift. A direction
    that is not periodic is ignored, whatever the cell says there. Raises InputError for NaN positions or a periodic
    direction without a cell vector.
    """
    positions = np.ascontiguousarray(positions, dtype=np.float64)
    pbc = np.asarray(pbc, dtype=bool)
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise InputError(f"positions of atom {atom} are {positions[atom].tolist()}; finite numbers in Å are accepted")
    box = _complete_cell(np.asarray(cell, dtype=np.float64), pbc)
    i, j, shifts = NeighborList(cutoff=cutoff, full_list=True).compute(
        points=positions, box=box, periodic=pbc.tolist(), quantities="ijS", copy=True
    )
    i, j, shifts = i.astype(np.int64), j.astype(np.int64), shifts.astype(np.int64)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], j, i))
    return np.stack([i[order], j[order]]), shifts[order]


def _complete_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Replace non-periodic lattice vectors by unit vectors that make the cell invertible."""
    box = cell.copy()
    if not np.isfinite(cell[pbc]).all():  # vesin would end the process with a floating point exception
        raise InputError(f"cell is {cell.tolist()}; finite numbers in Å are accepted")
    for axis in np.flatnonzero(pbc):
        if np.linalg.norm(cell[axis]) == 0:
            raise InputError(f"pbc is {pbc.tolist()} but cell vector {axis} is zero; give a cell or set pbc=False")
    if not pbc.all():
        periodic = box[pbc]
        # Orthonormal complement of the periodic vectors.
        _, _, basis = np.linalg.svd(np.concatenate([periodic, np.zeros((3 - len(periodic), 3))]))
        box[~pbc] = basis[len(periodic) :]
    if abs(np.linalg.det(box)) < 1e-9:
        raise InputError(f"cell {cell.tolist()} has no volume in its periodic directions")
    return box


class VerletList:
    """A neighbour list with a skin: rebuilt when an atom has moved more than half of it, or anything else changed.

    ``update`` returns (edge_index, shifts, rebuilt); the edges reach to cutoff + skin, so those beyond the cutoff are
    to be dropped (or weigh nothing) at every step. Positions may be wrapped or unwrapped between steps: a jump of a
    lattice vector only costs a rebuild.
    """

    def __init__(self, cutoff: float, skin: float = 0.5) -> None:
        if skin < 0:
            raise InputError(f"skin is {skin} Å; zero or more is accepted")
        self.cutoff, self.skin = cutoff, skin
        self.n_builds = 0
        self._reference: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._edges: tuple[np.ndarray, np.ndarray] | None = None

    def reset(self) -> None:
        """Forget the list; the next update builds it anew."""
        self._reference = None

    def update(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Edges that contain every pair within the cutoff of these positions."""
        if self._edges is not None and self._is_valid(positions, cell, pbc):
            return *self._edges, False
        self._edges = neighbor_list(positions, cell, pbc, self.cutoff + self.skin)
        self._reference = (positions.copy(), np.array(cell), np.array(pbc))
        self.n_builds += 1
        return *self._edges, True

    def _is_valid(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> bool:
        if self._reference is None or self._reference[0].shape != positions.shape:
            return False
        old, old_cell, old_pbc = self._reference
        if not (np.array_equal(old_cell, cell) and np.array_equal(old_pbc, pbc)):
            return False
        moved = float(np.square(positions - old).sum(axis=1).max(initial=0.0))
        return moved <= (0.5 * self.skin) ** 2  # NaN compares false and is refused by neighbor_list
