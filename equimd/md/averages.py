"""Means along a run with error bars, in memory that grows with the logarithm of its length.

The error bar is that of Flyvbjerg & Petersen, J. Chem. Phys. 91, 461 (1989): values are averaged in pairs, pairs of
pairs and so on, and each length of block gives an estimate s/sqrt(n). Correlation makes short blocks too optimistic, so
the largest estimate is taken among those of at least 16 blocks.
"""

from typing import Any

import numpy as np

from equimd.results import Block, Number

_FEWEST_BLOCKS = 16


class Mean(Block):
    """A mean over the stored frames with its standard error, which is NaN for fewer than 16 frames."""

    value: float
    stderr: Number


class Average:
    """Mean and error bar of a series that is given value by value."""

    def __init__(self, levels: list[list[Any]] | None = None) -> None:
        # Of each length of block: the number of blocks, their mean, the sum of their squared deviations, and a block
        # that waits for its partner.
        self.levels = levels or []

    def add(self, value: float) -> None:
        """One more value."""
        block: float | None = float(value)
        for level in range(len(self.levels) + 1):
            if level == len(self.levels):
                self.levels.append([0, 0.0, 0.0, None])
            row = self.levels[level]
            away = block - row[1]
            row[0] += 1
            row[1] += away / row[0]
            row[2] += away * (block - row[1])
            if row[3] is None:
                row[3] = block
                return
            block, row[3] = (row[3] + block) / 2, None

    def mean(self) -> Mean | None:
        """The mean so far; None if there is no value."""
        if not self.levels:
            return None
        errors = [np.sqrt(squares / (n - 1) / n) for n, _, squares, _ in self.levels if n >= _FEWEST_BLOCKS]
        return Mean(value=self.levels[0][1], stderr=float(max(errors, default=float("nan"))))
