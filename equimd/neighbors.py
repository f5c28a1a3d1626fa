"""Neighbour lists: vesin behind one function, and a Verlet skin outside autograd."""

import numpy as np
from vesin import NeighborList

from equimd.errors import InputError

_SMALLEST_LIMIT, _LARGEST_LIMIT = 1.1, 1.6  # Å, see check_images
_FAR, _MOST_CELLS = 1e4, 1e9  # Å and lattice vectors, see _within_reach


def neighbor_list(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Every directed pair within ``cutoff`` Å, periodic images included.

    positions (N, 3) Å, cell (3, 3) rows, pbc (3,) bool. Returns edge_index (2, E) int64 as [receiver, sender] and
    shifts (E, 3) int64 with r_ij = x_j − x_i + S_ij @ cell, sorted by receiver, then sender, then shift. A direction
    that is not periodic is ignored, whatever the cell says there. Raises InputError for positions that are not finite
    and for a periodic direction without a finite cell vector.
    """
    positions = np.ascontiguousarray(positions, dtype=np.float64)
    pbc = np.asarray(pbc, dtype=bool)
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise InputError(f"positions of atom {atom} are {positions[atom].tolist()}; finite numbers in Å are accepted")
    box = _complete_cell(cell, pbc)
    positions = _within_reach(positions, box, pbc, cutoff)
    i, j, shifts = NeighborList(cutoff=cutoff, full_list=True).compute(
        points=positions, box=box, periodic=pbc.tolist(), quantities="ijS", copy=True
    )
    i, j, shifts = i.astype(np.int64), j.astype(np.int64), shifts.astype(np.int64)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], j, i))
    return np.stack([i[order], j[order]]), shifts[order]


def used_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """A copy of the cell (3, 3) in which vectors that are not finite are zero; those of a periodic direction must be.

    Zero times infinity is no number: what a direction that is not periodic says must not reach an edge vector.
    """
    used = np.array(cell, dtype=np.float64)
    bad = ~np.isfinite(used).all(axis=1)
    if bad.any():
        if (bad & pbc).any():  # vesin would end the process with a floating point exception
            raise InputError(f"cell is {used.tolist()}; finite numbers in Å are accepted")
        used[bad] = 0.0
    return used


def check_images(numbers: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> None:
    """Refuse a cell so small that atoms lie inside their own periodic images, such as the dummy ``CRYST1 1 1 1``.

    The limit is 0.8 times the sum of two covalent radii of the largest atom, but within 1.1 and 1.6 Å: hydrogen at
    500 GPa, the densest crystal there is of an element with few electrons, has a lattice vector of 1.2 Å, fcc
    aluminium of 2.9 Å, diamond of 2.5 Å.

    Raises:
        InputError: for a lattice vector below the limit.
    """
    pbc = np.asarray(pbc, dtype=bool)
    if not pbc.any():
        return
    box = _complete_cell(cell, pbc)
    # No lattice vector is shorter than the distance of the lattice planes, one over a column of the inverse.
    if _LARGEST_LIMIT * np.linalg.norm(np.linalg.inv(box)[:, pbc], axis=0).max() < 1.0:
        return
    _, shifts = neighbor_list(np.zeros((1, 3)), cell, pbc, _LARGEST_LIMIT)
    if len(shifts) == 0:
        return
    from ase.data import covalent_radii

    distance = float(np.linalg.norm(shifts @ used_cell(cell, pbc), axis=1).min())
    radius = covalent_radii[np.clip(numbers, 0, len(covalent_radii) - 1)].max(initial=0.0)
    limit = float(np.clip(1.6 * radius, _SMALLEST_LIMIT, _LARGEST_LIMIT))
    if distance < limit:
        raise InputError(
            f"every atom is {distance:.3g} Å from its own periodic image; at least {limit:.3g} Å is accepted. "
            "If the cell is a dummy such as CRYST1 1 1 1, set pbc=False; otherwise give the true cell in Å"
        )


def _complete_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Replace non-periodic lattice vectors by unit vectors that make the cell invertible."""
    cell = used_cell(cell, pbc)
    box = cell.copy()
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


def _within_reach(positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """Positions with the same neighbours that vesin can count cells for; almost always the positions given.

    Its integers have 32 bits: farther away along a periodic direction it returns wrong edges, and for a molecule or
    slab that has lost an atom to the vacuum it ends the process. So empty space wider than 2 cutoffs is taken out along
    directions that are not periodic, where it changes no pair within the cutoff.
    """
    if np.abs(positions).max(initial=0.0) < _FAR:
        return positions
    coordinates = positions @ np.linalg.inv(box)
    cells = np.abs(coordinates[:, pbc]).max(axis=1, initial=0.0)
    if cells.max() > _MOST_CELLS:
        atom = int(cells.argmax())
        raise InputError(
            f"positions of atom {atom} are {positions[atom].tolist()}; at most {_MOST_CELLS:g} lattice vectors "
            "from the origin are accepted"
        )
    for axis in np.flatnonzero(~pbc):  # in Å: these vectors of the box have length one and are orthogonal to all others
        order = coordinates[:, axis].argsort()
        gaps = np.diff(coordinates[order, axis], prepend=coordinates[order[0], axis])
        coordinates[order, axis] = np.cumsum(np.minimum(gaps, 2 * cutoff))
    return coordinates @ box


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
        # Edges, shifts, and positions, cell and pbc that they are of: replaced as one, whatever interrupts the search.
        self._held: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None

    def reset(self) -> None:
        """Forget the list; the next update builds it anew."""
        self._held = None

    def update(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Edges that contain every pair within the cutoff of these positions."""
        if self._held is not None and self._is_valid(positions, cell, pbc):
            return *self._held[:2], False
        edges, shifts = neighbor_list(positions, cell, pbc, self.cutoff + self.skin)
        self._held = edges, shifts, positions.copy(), np.array(cell), np.array(pbc)
        self.n_builds += 1
        return edges, shifts, True

    def _is_valid(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> bool:
        if self._held is None or self._held[2].shape != positions.shape:
            return False
        old, old_cell, old_pbc = self._held[2:]
        if not (np.array_equal(old_cell, cell) and np.array_equal(old_pbc, pbc)):
            return False
        moved = float(np.square(positions - old).sum(axis=1).max(initial=0.0))
        return moved <= (0.5 * self.skin) ** 2  # NaN compares false and is refused by neighbor_list
