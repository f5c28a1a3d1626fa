"""Fingerprints of structures and the duplicates they find: copies that were moved, rotated, reflected or reordered.

A fingerprint is WIDTH sums over directed edges of smooth functions of the distance that vanish at the cutoff,

    φ = N^(−1/2) Σ_ij  u_ij cos(π k r_ij / r_c) (1 − (r_ij / r_c)²)²,    k = 0, 1, 2,    u_ij = 1 and h(Z_i) h(Z_j),

so it does not depend on where the structure is, how it is turned, or in which order its atoms come, and moves by little
when positions are rounded. Frames whose fingerprints are near are candidates; distances between atoms decide.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from ase.geometry import find_mic

if TYPE_CHECKING:
    from equimd.frames.arrays import FrameArrays

TOLERANCE = 1e-4
"""How far, in Å, atoms of a duplicate may be from where they are in the original."""
_ORDERS = (0, 1, 2)
WIDTH = 2 * len(_ORDERS)
_N_CANDIDATES = 8
# Rounding positions to TOLERANCE moves fingerprints of molecules and of water boxes by 0.0007 to 0.0009, with 8 to 40
# neighbours; structures that differ are farther apart than 0.007.
_RADIUS = 10.0 * TOLERANCE
_ALL_PAIRS = 200  # atoms up to which every distance of a frame is compared, not only those within the cutoff


def fingerprints(chunk: Mapping[str, np.ndarray], cutoff: float) -> np.ndarray:
    """Fingerprints (S, WIDTH) of frames packed as in ``FrameArrays``."""
    n_atoms, n_edges = np.asarray(chunk["n_atoms"]), np.asarray(chunk["n_edges"])
    frame = np.repeat(np.arange(len(n_atoms)), n_edges)
    first = (np.cumsum(n_atoms) - n_atoms)[frame]
    i, j = first + chunk["edges"][:, 0], first + chunk["edges"][:, 1]
    vectors = chunk["positions"][j] - chunk["positions"][i]
    if np.asarray(chunk["shifts"]).any():
        vectors = vectors + np.einsum("ea,eab->eb", chunk["shifts"], np.asarray(chunk["cell"])[frame])
    x = np.sqrt(np.einsum("ea,ea->e", vectors, vectors)) / cutoff
    element = 1.0 + 0.5 * np.sin(1.7 * np.arange(256))
    pair = element[chunk["numbers"][i]] * element[chunk["numbers"][j]]
    taper = (1.0 - x * x) ** 2
    sums = []
    for k in _ORDERS:
        term = np.cos(np.pi * k * x) * taper
        sums += [np.bincount(frame, weights * term, len(n_atoms)) for weights in (1.0, pair)]
    return np.stack(sums, axis=1) / np.sqrt(n_atoms)[:, None]


def duplicates_between(known: "FrameArrays", others: "FrameArrays") -> list[tuple[int, int]]:
    """Frames of ``others`` that are in ``known``: (place there, place in ``known``), in order; single atoms left out.

    Both must have been packed with one cutoff. Memory is that of the fingerprints.
    """
    return [(k, originals[0]) for k, originals in _search(known, others)]


def duplicates_within(frames: "FrameArrays") -> list[tuple[int, int]]:
    """Frames that are in the set before: (place, place of the first), in order; single atoms are left out."""
    first: dict[int, int] = {}

    def root(k: int) -> int:
        while first.get(k, k) != k:
            k = first[k]
        return k

    for k, originals in _search(frames, frames):
        for original in originals:
            low, high = sorted((root(k), root(original)))
            first[high] = low
    return [(k, root(k)) for k in sorted(first) if root(k) != k]


def _search(known: "FrameArrays", others: "FrameArrays") -> Iterator[tuple[int, list[int]]]:
    """Every frame of ``others`` with an equal in ``known`` that is not itself, and those equals."""
    from scipy.spatial import KDTree

    if not len(known) or not len(others):
        return
    tree = KDTree(np.asarray(known["fingerprint"]))
    count = min(_N_CANDIDATES, len(known))
    for frames, _, _ in others.chunks():
        distances, places = tree.query(np.asarray(others["fingerprint"][frames]), k=count)
        distances, places = distances.reshape(-1, count), places.reshape(-1, count)
        neighbors = np.maximum(others["n_edges"][frames] / others["n_atoms"][frames], 1.0)
        near = distances <= (_RADIUS * np.sqrt(neighbors))[:, None]
        near[others["n_atoms"][frames] < 2] = False
        for row in np.flatnonzero(near.sum(axis=1) > (known is others)):
            k = frames.start + int(row)
            candidates = [p for p in sorted(places[row][near[row]].tolist()) if known is not others or p != k]
            equals = [p for p in candidates if _equal(known, p, others, k)]
            if equals:
                yield k, equals


def _equal(a: "FrameArrays", p: int, b: "FrameArrays", q: int) -> bool:
    """Whether the elements and all distances between atoms of the same elements agree; without distances nothing does.

    Where frames are periodic, those of nearest images and those within the cutoff; where large, only the latter.
    """
    if not np.array_equal(np.sort(a.frame(p)["numbers"]), np.sort(b.frame(q)["numbers"])):
        return False
    one, other = _distances(a, p), _distances(b, q)
    if one.keys() != other.keys() or not one:
        return False
    tolerance = 2.0 * np.sqrt(3.0) * TOLERANCE
    edge = float(a.meta["cutoff"]) - tolerance
    for key, distances in one.items():
        count = min(len(distances), len(other[key]))
        rest = np.concatenate([distances[count:], other[key][count:]])
        if np.abs(distances[:count] - other[key][:count]).max(initial=0.0) > tolerance or (rest < edge).any():
            return False
    return True


def _distances(frames: "FrameArrays", k: int) -> dict[int, np.ndarray]:
    """Ascending distances by pair of elements, of all pairs of atoms and, by keys of their own, of all edges."""
    frame = frames.frame(k)
    numbers, positions, is_periodic = frame["numbers"].astype(np.int64), frame["positions"], frame["pbc"].any()
    is_small, found = len(numbers) <= _ALL_PAIRS, {}
    if is_small:
        i, j = np.triu_indices(len(numbers), 1)
        vectors = positions[j] - positions[i]
        if is_periodic and len(vectors):
            vectors = find_mic(vectors, frame["cell"], frame["pbc"])[0]  # pyright: ignore[reportArgumentType]
        found |= _by_elements(numbers[i], numbers[j], vectors, 0)
    if is_periodic or not is_small:
        i, j = frame["edges"].T
        vectors = positions[j] - positions[i] + frame["shifts"] @ frame["cell"]
        found |= _by_elements(numbers[i], numbers[j], vectors, 1)
    return found


def _by_elements(first: np.ndarray, second: np.ndarray, vectors: np.ndarray, kind: int) -> dict[int, np.ndarray]:
    """Ascending lengths by the atomic numbers at both ends, and by ``kind``."""
    distances = np.linalg.norm(vectors, axis=1)
    code = (kind * 256 + np.minimum(first, second)) * 256 + np.maximum(first, second)
    order = np.lexsort((distances, code))
    codes, starts = np.unique(code[order], return_index=True)
    return dict(zip(codes.tolist(), np.split(distances[order], starts[1:]), strict=True)) if len(codes) else {}
