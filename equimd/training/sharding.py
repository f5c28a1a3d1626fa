"""Which frames go where: the parts of a batch that processes take, and the passes that a process takes them in."""

import numpy as np


def balanced_parts(n_edges: np.ndarray, n_parts: int) -> list[np.ndarray]:
    """Places 0 … B−1 of frames with ``n_edges`` (B,) dealt to ``n_parts``, each ascending; a part may be empty.

    The largest frame first, each to the part with the fewest edges so far, the first of several such (Graham's rule:
    no part exceeds the best possible by more than a third). Depends on the numbers only, so that all processes agree.
    """
    if n_parts == 1:
        return [np.arange(len(n_edges))]
    load = np.zeros(n_parts, dtype=np.int64)
    owner = np.empty(len(n_edges), dtype=np.int64)
    for frame in np.argsort(-n_edges, kind="stable"):
        owner[frame] = np.argmin(load)
        load[owner[frame]] += max(int(n_edges[frame]), 1)
    return [np.flatnonzero(owner == part) for part in range(n_parts)]


def passes(n_edges: np.ndarray, max_edges: int | None) -> list[np.ndarray]:
    """Places 0 … B−1 cut into consecutive passes of at most ``max_edges``; a larger frame is one by itself."""
    cuts, held = [], 0
    for place, size in enumerate(n_edges.tolist()):
        if place and max_edges is not None and held + size > max_edges:
            cuts.append(place)
            held = 0
        held += size
    return np.split(np.arange(len(n_edges)), cuts) if len(n_edges) else []


def contiguous_part(edge_start: np.ndarray, part: int, n_parts: int) -> tuple[int, int]:
    """The range of frames that is part number ``part``, all parts with about as many edges; it may be empty.

    ``edge_start`` (S + 1,): where the edges of each frame begin.
    """
    first, last = int(edge_start[0]), int(edge_start[-1])
    cuts = np.searchsorted(edge_start, first + (last - first) * np.arange(n_parts + 1) / n_parts)
    cuts[0], cuts[-1] = 0, len(edge_start) - 1
    return int(cuts[part]), int(cuts[part + 1])
