"""The order of the edges of one graph: made once per neighbour list, used by every kernel call on it."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Topology:
    """Edges of a graph in two orders; the kernels walk receivers one by one, and senders for the gradient of ``x``.

    senders, receivers (E,) int64. Edges into receiver n are ``receiver_order[receiver_ptr[n]:receiver_ptr[n+1]]``, the
    same with senders; an order (E,) int64, a ptr (N+1,) int64. ``n_senders`` counts the rows of ``x``.
    """

    senders: Tensor
    receivers: Tensor
    n_senders: int
    n_receivers: int
    receiver_order: Tensor
    receiver_ptr: Tensor
    _splits: dict[int, list[int]] = field(default_factory=dict, repr=False)
    _groups: dict[int, tuple[Tensor, list[int]]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def _by_sender(self) -> tuple[Tensor, Tensor]:
        return _compress(self.senders, self.n_senders)

    @property
    def sender_order(self) -> Tensor:
        """Edges sorted by sender (E,)."""
        return self._by_sender[0]

    @property
    def sender_ptr(self) -> Tensor:
        """Where the edges out of each sender begin in ``sender_order`` (N+1,)."""
        return self._by_sender[1]

    @functools.cached_property
    def senders_by_receiver(self) -> Tensor:
        """Senders of the edges in ``receiver_order`` (E,)."""
        return self.senders[self.receiver_order]

    @functools.cached_property
    def receivers_by_sender(self) -> Tensor:
        """Receivers of the edges in ``sender_order`` (E,)."""
        return self.receivers[self.sender_order]

    @functools.cached_property
    def n_edges(self) -> int:
        """Number of edges E."""
        return int(self.senders.shape[0])

    @functools.cached_property
    def receiver_ptr_list(self) -> list[int]:
        """``receiver_ptr`` as numbers."""
        return self.receiver_ptr.tolist()

    def split(self, n_parts: int) -> list[int]:
        """Bounds of ``n_parts`` consecutive ranges of receivers with about equally many edges."""
        if n_parts == 1:
            return [0, self.n_receivers]
        if n_parts not in self._splits:
            self._splits[n_parts] = [0, *_fair_bounds(self.receiver_ptr, n_parts), self.n_receivers]
        return self._splits[n_parts]

    def sender_groups(self, n_parts: int) -> tuple[Tensor, list[int]]:
        """``n_parts`` groups of edges, by ranges of senders, each sorted by receiver: their order (E,) and bounds."""
        if n_parts == 1:
            return self.receiver_order, [0, self.n_edges]
        if n_parts not in self._groups:
            ptr = torch.zeros(self.n_senders + 1, dtype=torch.int64, device="cpu")
            torch.cumsum(torch.bincount(self.senders, minlength=self.n_senders), 0, out=ptr[1:])
            inner = _fair_bounds(ptr, n_parts)
            group = torch.bucketize(self.senders[self.receiver_order], torch.tensor(inner, device="cpu"), right=True)
            order = self.receiver_order[torch.argsort(group, stable=True)]
            self._groups[n_parts] = order, ptr[[0, *inner, self.n_senders]].tolist()
        return self._groups[n_parts]


def _fair_bounds(ptr: Tensor, n_parts: int) -> list[int]:
    """Where to cut a range of nodes, whose edges begin at ``ptr``, into parts with about equally many edges."""
    targets = torch.linspace(0, int(ptr[-1]), n_parts + 1, dtype=torch.float64)[1:-1].round().to(torch.int64)
    return torch.searchsorted(ptr.cpu(), targets).tolist()


def make_topology(senders: Tensor, receivers: Tensor, n_receivers: int, n_senders: int | None = None) -> Topology:
    """Sort the edges by receiver, at no cost where they are sorted already, and, when asked for, by sender; stably.

    Raises:
        ValueError: for indices of another shape than (E,), or outside 0 … N−1.
    """
    n_senders = n_receivers if n_senders is None else n_senders
    if senders.ndim != 1 or senders.shape != receivers.shape:
        raise ValueError(f"senders and receivers must be (E,), got {tuple(senders.shape)}, {tuple(receivers.shape)}")
    senders = senders.detach().to(torch.int64).contiguous()
    receivers = receivers.detach().to(torch.int64).contiguous()
    for name, index, n in (("senders", senders, n_senders), ("receivers", receivers, n_receivers)):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= n):
            raise ValueError(f"{name} must lie in 0..{n - 1}, got {int(index.min())}..{int(index.max())}")
    return Topology(
        senders,
        receivers,
        n_senders,
        n_receivers,
        *_compress(receivers, n_receivers),
    )


def _compress(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(order, ptr) so that ``order[ptr[k]:ptr[k+1]]`` are the places where ``index`` is k, ascending."""
    ptr = torch.zeros(n + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(index, minlength=n), 0, out=ptr[1:])
    if bool((index[1:] >= index[:-1]).all()):
        return torch.arange(index.numel(), device=index.device), ptr
    return torch.argsort(index, stable=True), ptr
