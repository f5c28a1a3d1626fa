"""One pass over the frames of a file: the numbers and distributions that an inspection reports and draws."""

from dataclasses import dataclass, field

import numpy as np
from ase.data import covalent_radii

from equimd.frames.arrays import FrameArrays
from equimd.frames.compositions import composition_counts
from equimd.results import Block

SIGMAS = 6.0
"""Robust standard deviations from the median, beyond which a frame is an outlier."""
_MOST_OUTLIERS = 0.1  # of the frames: what more of them share is a second kind of frame
_SMALL_FORCE = 0.05  # eV/Å: below it, no force is too large
_TOO_CLOSE = 0.6  # of the sum of covalent radii
FORCE_BINS = np.logspace(-4, 3, 141)
N_DISTANCE_BINS = 120


class Outlier(Block):
    """A frame that is far from the others: what is odd about it, and the number in its unit."""

    frame: int
    what: str
    value: float
    unit: str


@dataclass
class Survey:
    """Of each frame: the largest force, its energy per atom beyond the fit (``energies`` by atomic number), the sum of
    its forces per atom, its closest atoms, in Å and relative to covalent radii, and whether an atom has no neighbours.

    Of each element: atoms, sum of squares and number of force components, atoms by force in FORCE_BINS. Of each pair of
    elements: edges by length in N_DISTANCE_BINS up to the cutoff. ``lengths`` are those of all forces. eV, eV/Å, Å.
    """

    arrays: FrameArrays
    energies: dict[int, float] | None
    largest_force: np.ndarray = field(init=False)
    energy: np.ndarray = field(init=False)
    net_force: np.ndarray = field(init=False)
    closest: np.ndarray = field(init=False)
    closeness: np.ndarray = field(init=False)
    alone: np.ndarray = field(init=False)
    lengths: np.ndarray = field(init=False)
    n_atoms: dict[int, int] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)
    components: dict[int, int] = field(default_factory=dict)
    forces: dict[int, np.ndarray] = field(default_factory=dict)
    distances: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.arrays)
        self.largest_force, self.energy, self.net_force = np.full((3, size), np.nan)
        self.closest, self.closeness = np.full((2, size), np.inf)
        self.alone = np.zeros(size, dtype=bool)
        for z in self.arrays.meta["species"]:
            self.n_atoms[z], self.squares[z], self.components[z] = 0, 0.0, 0
            self.forces[z] = np.zeros(len(FORCE_BINS) - 1)
        lengths = []
        for chunk in self.arrays.chunks():
            lengths.append(self._look_at_forces(*chunk))
            self._look_at_energies(*chunk)
            self._look_at_distances(*chunk)
        self.lengths = np.concatenate(lengths)

    def _look_at_forces(self, frames: slice, atoms: slice, _: slice) -> np.ndarray:
        numbers, force = np.asarray(self.arrays["numbers"][atoms]), np.asarray(self.arrays["forces"][atoms])
        n_atoms = self.arrays["n_atoms"][frames]
        first = np.cumsum(n_atoms) - n_atoms
        length = np.linalg.norm(force, axis=1)
        self.largest_force[frames] = np.maximum.reduceat(length, first)
        self.net_force[frames] = np.linalg.norm(np.add.reduceat(force, first), axis=1) / n_atoms
        for z in self.forces:
            own = length[(numbers == z) & np.isfinite(length)]
            self.n_atoms[z] += int((numbers == z).sum())
            self.squares[z] += float((own**2).sum())
            self.components[z] += 3 * own.size
            self.forces[z] += np.histogram(own, FORCE_BINS)[0]
        return length[np.isfinite(length)].astype(np.float32)

    def _look_at_energies(self, frames: slice, atoms: slice, _: slice) -> None:
        if self.energies is not None:
            reference = np.array([self.energies[z] for z in self.arrays.meta["species"]])
            fitted = composition_counts(self.arrays, frames, atoms) @ reference
            self.energy[frames] = (self.arrays["energy"][frames] - fitted) / self.arrays["n_atoms"][frames]

    def _look_at_distances(self, frames: slice, atoms: slice, edges: slice) -> None:
        numbers, n_atoms = np.asarray(self.arrays["numbers"][atoms]), self.arrays["n_atoms"][frames]
        length, i, j = self.arrays.distances(frames, atoms, edges)
        frame = np.repeat(np.arange(len(n_atoms)), self.arrays["n_edges"][frames])
        np.minimum.at(self.closest[frames], frame, length)
        radii = covalent_radii[numbers[i]] + covalent_radii[numbers[j]]
        np.minimum.at(self.closeness[frames], frame, length / radii)
        neighbors = np.bincount(i, minlength=len(numbers))
        self.alone[frames] = (np.minimum.reduceat(neighbors, np.cumsum(n_atoms) - n_atoms) == 0) & (n_atoms > 1)
        low, high = np.minimum(numbers[i], numbers[j]), np.maximum(numbers[i], numbers[j])
        code = low.astype(np.int64) * 256 + high
        for pair in np.unique(code).tolist():
            counts = np.histogram(length[code == pair], N_DISTANCE_BINS, (0.0, self.arrays.meta["cutoff"]))[0]
            key = divmod(pair, 256)
            self.distances[key] = self.distances.get(key, 0) + counts

    def outliers(self) -> list[Outlier]:
        """Frames that are far from the others, the farthest first."""
        index = np.asarray(self.arrays["index"])
        too_close = np.where(self.closeness < _TOO_CLOSE, SIGMAS * _TOO_CLOSE / np.maximum(self.closeness, 1e-6), 0.0)
        found: list[tuple[float, Outlier]] = []
        for what, values, score, unit in (
            (
                "largest force",
                self.largest_force,
                _robust(np.log(np.maximum(self.largest_force, _SMALL_FORCE)), 0.1),
                "eV/Å",
            ),
            ("energy beyond the fit", 1000.0 * self.energy, np.abs(_robust(self.energy, 1e-4)), "meV/atom"),
            ("closest atoms", self.closest, too_close, "Å"),
            ("atoms without neighbours", self.alone.astype(float), np.where(self.alone, 2.0 * SIGMAS, 0.0), ""),
        ):
            for k in np.flatnonzero(score > SIGMAS):
                outlier = Outlier(frame=int(index[k]), what=what, value=float(values[k]), unit=unit)
                found.append((float(score[k]), outlier))
        found.sort(key=lambda item: -item[0])
        return [outlier for _, outlier in found]


def _robust(values: np.ndarray, least: float) -> np.ndarray:
    """Distance from the median in standard deviations, as the median deviation gives them, at least ``least``.

    Where that makes outliers of more than a tenth of the frames, the values have another shape: a standard deviation is
    then what makes a tenth of a normal distribution lie as far out as the outermost tenth does.
    """
    known = values[np.isfinite(values)]
    if len(known) < 10:
        return np.zeros_like(values)
    middle = np.median(known)
    away = np.abs(known - middle)
    width = max(1.4826 * float(np.median(away)), least)
    if np.mean(away > SIGMAS * width) > _MOST_OUTLIERS:
        width = max(float(np.quantile(away, 1.0 - _MOST_OUTLIERS)) / 1.645, least)
    return np.where(np.isfinite(values), (values - middle) / width, 0.0)
