"""Which irreps multiply which, with which Clebsch-Gordan coefficients, and where each product is written.

Features are channel-last: ``x`` has shape (N, D_in, C), and D_in concatenates the 2l+1 components of the irreps in the
order in which they are given. A *path* couples an input irrep (l1, p1) and a spherical harmonic (l2, (−1)^l2) to an
output irrep (l3, p3 = p1·(−1)^l2), |l1 − l2| ≤ l3 ≤ l1 + l2. Every path writes 2·l3+1 rows of its own into the output
(N, D_out, C). Paths to the same output irrep lie side by side, so that
``out[:, block.rows].unflatten(1, (block.n_paths, 2 * block.l + 1))`` is what the next linear layer mixes,
(path, C) → C'.

Normalisation is by component: the coefficients of a path are e3nn's ``wigner_3j`` times √(2·l3+1), so that independent
unit-variance components of ``x`` and of the harmonics give unit-variance components of the output. Spherical harmonics
are e3nn's with ``normalize=True, normalization="component"``, real, and ordered l = 0, 1, …, l_max_sh.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from equimd.kernels.wigner import wigner_3j

Irrep: TypeAlias = tuple[int, int]
"""(l, p): the degree and the parity, ±1."""


@dataclass(frozen=True)
class Path:
    """One product (l1, p1) ⊗ l2 → (l3, p3); offsets count rows, ``cg`` is (2·l1+1, 2·l2+1, 2·l3+1) float64."""

    l1: int
    p1: int
    l2: int
    l3: int
    p3: int
    in_offset: int
    sh_offset: int
    out_offset: int
    weight_index: int
    cg: np.ndarray = field(repr=False, compare=False)

    @property
    def in_rows(self) -> slice:
        """Rows of ``x`` that the path reads."""
        return slice(self.in_offset, self.in_offset + 2 * self.l1 + 1)

    @property
    def sh_rows(self) -> slice:
        """Components of the spherical harmonics that the path reads."""
        return slice(self.sh_offset, self.sh_offset + 2 * self.l2 + 1)

    @property
    def out_rows(self) -> slice:
        """Rows of the output that the path writes."""
        return slice(self.out_offset, self.out_offset + 2 * self.l3 + 1)


@dataclass(frozen=True)
class OutputBlock:
    """The rows of all paths into one output irrep (l, p); empty where no path leads to it."""

    l: int  # noqa: E741
    p: int
    offset: int
    n_paths: int

    @property
    def rows(self) -> slice:
        """Rows of the output: ``n_paths`` times 2l+1, path-major."""
        return slice(self.offset, self.offset + self.n_paths * (2 * self.l + 1))


@dataclass(frozen=True)
class ConvolutionPlan:
    """The layout of one convolution; hashable. Made by ``make_plan``."""

    irreps_in: tuple[Irrep, ...]
    l_max_sh: int
    irreps_out: tuple[Irrep, ...]
    paths: tuple[Path, ...] = field(repr=False, compare=False)
    blocks: tuple[OutputBlock, ...] = field(repr=False, compare=False)

    digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Equality and hash are those of the irreps and of the coefficients."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(repr(path).encode() + path.cg.tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    @property
    def n_paths(self) -> int:
        """Number of paths P, the second axis of the radial weights (E, P, C)."""
        return len(self.paths)

    @functools.cached_property
    def dim_in(self) -> int:
        """Rows D_in of the input."""
        return irreps_dim(self.irreps_in)

    @functools.cached_property
    def dim_sh(self) -> int:
        """Number of spherical harmonics, (l_max_sh + 1)²."""
        return (self.l_max_sh + 1) ** 2

    @functools.cached_property
    def dim_out(self) -> int:
        """Rows D_out of the output, Σ over paths of 2·l3+1."""
        return sum(2 * path.l3 + 1 for path in self.paths)

    @functools.cached_property
    def n_terms(self) -> int:
        """Number of nonzero coefficients: multiply-adds per edge and channel."""
        return sum(int(np.count_nonzero(path.cg)) for path in self.paths)

    @property
    def out_slices(self) -> dict[Irrep, slice]:
        """Output rows per output irrep."""
        return {(block.l, block.p): block.rows for block in self.blocks}


def irreps_dim(irreps: Sequence[Irrep]) -> int:
    """Number of components of the irreps, Σ 2l+1."""
    return sum(2 * l + 1 for l, _ in irreps)  # noqa: E741


def standard_irreps(l_max: int, parity: bool = False) -> tuple[Irrep, ...]:
    """Irreps up to ``l_max``: of natural parity p = (−1)^l only, or of both parities, the natural one first.

    ``standard_irreps(2)`` is 0e 1o 2e; ``standard_irreps(1, parity=True)`` is 0e 0o 1o 1e.
    """
    natural = [(l, (-1) ** l) for l in range(l_max + 1)]  # noqa: E741
    if not parity:
        return tuple(natural)
    return tuple(irrep for l, p in natural for irrep in ((l, p), (l, -p)))  # noqa: E741


def make_plan(irreps_in: Sequence[Irrep], l_max_sh: int, irreps_out: Sequence[Irrep]) -> ConvolutionPlan:
    """All paths from ``irreps_in`` by harmonics up to ``l_max_sh`` to ``irreps_out``, with offsets and coefficients.

    Paths are ordered by output irrep, then input irrep, then l2. The same arguments return the same object.

    Raises:
        ValueError: for an irrep that is not (l ≥ 0, ±1) or stands twice, or for a negative ``l_max_sh``.
    """
    irreps_in = tuple((int(l), int(p)) for l, p in irreps_in)  # noqa: E741
    irreps_out = tuple((int(l), int(p)) for l, p in irreps_out)  # noqa: E741
    for irreps in (irreps_in, irreps_out):
        if len(set(irreps)) != len(irreps) or any(l < 0 or p not in (-1, 1) for l, p in irreps):  # noqa: E741
            raise ValueError(f"irreps must be distinct pairs (l >= 0, +1 or -1), got {irreps}")
    if l_max_sh < 0:
        raise ValueError(f"l_max_sh must not be negative, got {l_max_sh}")
    return _make_plan(irreps_in, int(l_max_sh), irreps_out)


def make_layer_plan(l_max: int, parity: bool = False) -> ConvolutionPlan:
    """The plan of a hidden layer: input, harmonics and output all up to ``l_max``."""
    irreps = standard_irreps(l_max, parity)
    return make_plan(irreps, l_max, irreps)


@functools.lru_cache(maxsize=128)
def _make_plan(irreps_in: tuple[Irrep, ...], l_max_sh: int, irreps_out: tuple[Irrep, ...]) -> ConvolutionPlan:
    paths: list[Path] = []
    blocks: list[OutputBlock] = []
    offset = 0
    for l3, p3 in irreps_out:
        start, count = offset, 0
        in_offset = 0
        for l1, p1 in irreps_in:
            for l2 in range(l_max_sh + 1):
                if abs(l1 - l2) <= l3 <= l1 + l2 and p3 == p1 * (-1) ** l2:
                    cg = clebsch_gordan(l1, l2, l3)
                    paths.append(Path(l1, p1, l2, l3, p3, in_offset, l2 * l2, offset, len(paths), cg))
                    offset += 2 * l3 + 1
                    count += 1
            in_offset += 2 * l1 + 1
        blocks.append(OutputBlock(l3, p3, start, count))
    return ConvolutionPlan(irreps_in, l_max_sh, irreps_out, tuple(paths), tuple(blocks))


@functools.cache
def clebsch_gordan(l1: int, l2: int, l3: int) -> np.ndarray:
    """Coefficients √(2·l3+1) · wigner_3j, (2·l1+1, 2·l2+1, 2·l3+1) float64, read-only; round-off set to zero."""
    cg = wigner_3j(l1, l2, l3) * math.sqrt(2 * l3 + 1)
    cg[np.abs(cg) < 1e-12] = 0.0
    cg.setflags(write=False)
    return cg
