"""Arrays that live between the steps of a frozen network, kept from call to call."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """An array: the axis whose size it grows with, numbers per row of that axis, and their type."""

    axis: str
    width: int
    dtype: torch.dtype


class Workspace:
    """Flat arrays by name on the CPU, for one call at a time; ``constants`` are others that have an address too.

    tensors: the arrays. pointers: addresses of arrays and constants. An array is kept while its size is about right.
    """

    def __init__(self, fields: Mapping[str, Field], constants: Mapping[str, Tensor]) -> None:
        self._fields = fields
        self._sizes: dict[str, int] = {}
        self._room: dict[str, int] = {}
        self._rows: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.pointers: dict[str, int] = {name: tensor.data_ptr() for name, tensor in constants.items()}

    def fit(self, **sizes: int) -> None:
        """Make room along the axes named, with a little to spare for the next neighbour list."""
        for axis, size in sizes.items():
            if self._sizes.get(axis) == size:
                continue
            self._sizes[axis] = size
            self._rows.clear()
            room = self._room.get(axis, -1)
            if room / 4 <= size <= room:
                continue
            self._room[axis] = size + size // 20
            for name, field in self._fields.items():
                if field.axis == axis:
                    self.tensors[name] = torch.empty(self._room[axis] * field.width, dtype=field.dtype, device="cpu")
                    self.pointers[name] = self.tensors[name].data_ptr()

    def rows(self, name: str) -> Tensor:
        """An array as (rows, width), as many rows as were asked for."""
        rows = self._rows.get(name)
        if rows is None:
            field = self._fields[name]
            size = self._sizes[field.axis]
            rows = self._rows[name] = self.tensors[name][: size * field.width].view(size, field.width)
        return rows
