"""GROMACS' GRO files of any number of frames (https://manual.gromacs.org/current/reference-manual/file-formats.html#gro).

Positions are nm, velocities nm/ps, the time after `t=` in the title ps. The format has no elements: they come from
names that allow no other (see `atom_names`), or from a topology.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from ase import Atoms

from equimd import units
from equimd.errors import InputError
from equimd.frames.atom_names import element_of
from equimd.frames.topology import Site, Topology, with_masses

_TIME = re.compile(r"\bt\s*=\s*([-+.\deE]+)")
# v1(x) v2(y) v3(z) v1(y) v1(z) v2(x) v2(z) v3(x) v3(y), as places in the matrix whose rows are v1, v2, v3.
_BOX_ORDER = ((0, 1, 2, 0, 0, 1, 1, 2, 2), (0, 1, 2, 1, 2, 0, 2, 0, 1))


class GroTrajectory:
    """The frames of one file; `topology`, if given, has the elements."""

    def __init__(self, path: Path, topology: Topology | None = None):
        self.path, self._topology = path, topology

    def count(self) -> int:
        """Number of frames."""
        return sum(1 for _ in self._blocks())

    def frames(self) -> Iterator[Atoms]:
        """Frames in Å with velocities, `info["lossy"]`, and `info["time_fs"]` if the title has a time.

        Raises:
            InputError: if the file is damaged, or an atom's name does not tell its element.
        """
        last: tuple[list[str], Topology] | None = None
        for index, (title, lines, box) in enumerate(self._blocks()):
            where = f"{self.path}, frame {index}"
            names = [line[:15] for line in lines]
            if last is None or names != last[0]:
                last = names, self._read_topology(lines, where)
            values, digits = self._numbers(lines, where)
            topology = last[1]
            atoms = with_masses(Atoms(topology.numbers, positions=values[:, :3] * units.NM), topology.masses)
            cell = self._cell(box, where)
            if cell.any():
                atoms.set_cell(cell)
                atoms.pbc = True
            if values.shape[1] == 6:
                atoms.set_velocities(values[:, 3:] * (units.NM / 1000.0) * units.ASE_TIME_FS)
            atoms.info["lossy"] = f"gro: positions rounded to {units.NM * 10.0**-digits:g} Å"
            if found := _TIME.search(title):
                atoms.info["time_fs"] = 1000.0 * float(found[1])
            yield atoms

    def topology(self) -> Topology:
        """Elements and names of the first frame."""
        for _, lines, _ in self._blocks():
            return self._read_topology(lines, str(self.path))
        raise InputError(f"{self.path}: holds no frames; accepted: one or more")

    def _blocks(self) -> Iterator[tuple[str, list[str], str]]:
        """Title, lines of the atoms and line of the box of each frame."""
        index = 0
        try:
            with open(self.path, encoding="utf-8") as stream:
                while (title := stream.readline()).strip() or (title and not _at_end(stream)):
                    count = stream.readline()
                    if not count.strip().isdigit():
                        text = count.strip()[:40]
                        raise InputError(
                            f"{self.path}, frame {index}: number of atoms is {text!r}; accepted: an integer"
                        )
                    lines = [stream.readline() for _ in range(int(count))]
                    box = stream.readline()
                    if not box.strip():
                        raise InputError(f"{self.path}, frame {index}: the file ends within it; accepted: a whole file")
                    yield title, lines, box
                    index += 1
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: cannot be read ({error}); accepted: a whole GRO file") from error

    def _numbers(self, lines: list[str], where: str) -> tuple[np.ndarray, int]:
        """Positions and, if there are any, velocities (N, 3 or 6); and the digits of a position after its point.

        Columns are as wide as the points of the first two numbers are apart; velocities have a digit more each.
        """
        try:
            first = lines[0].index(".", 20)
            width = lines[0].index(".", first + 1) - first
            n_values = 6 if len(lines[0].rstrip()) > 20 + 3 * width + width // 2 else 3
            starts = [20 + width * k for k in range(n_values)]
            values = np.array([[float(line[start : start + width]) for start in starts] for line in lines])
        except (ValueError, IndexError) as error:
            raise InputError(f"{where}: {error}; accepted: positions in nm from column 21 on") from None
        return values, width - 5

    def _cell(self, box: str, where: str) -> np.ndarray:
        try:
            values = [float(text) for text in box.split()]
        except ValueError:
            values = []
        if len(values) not in (3, 9):
            raise InputError(f"{where}: the box is {box.strip()[:60]!r}; accepted: 3 or 9 numbers")
        cell = np.zeros((3, 3))
        cell[_BOX_ORDER[0][: len(values)], _BOX_ORDER[1][: len(values)]] = values
        return cell * units.NM

    def _read_topology(self, lines: list[str], where: str) -> Topology:
        sites = [Site(line[10:15].strip(), line[5:10].strip(), line[:5].strip(), "") for line in lines]
        if self._topology is not None:
            if len(self._topology.numbers) != len(lines):
                n_given = len(self._topology.numbers)
                raise InputError(f"{where}: {len(lines)} atoms, but {self._topology.where} has {n_given}")
            return Topology(self._topology.numbers, where, self._topology.masses, sites)
        numbers = [element_of(site.name, site.residue) for site in sites]
        if None in numbers:
            atom = numbers.index(None)
            site = sites[atom]
            raise InputError(
                f"{where}: the element of atom {atom} ({site.name} of {site.residue} {site.number}) is not certain;"
                " accepted: topology=... with the elements"
            )
        return Topology(np.array(numbers, dtype=np.int64), where, sites=sites)


def _at_end(stream: IO[str]) -> bool:
    """Whether nothing but empty lines follows an empty one, which could be a title."""
    place = stream.tell()
    rest = stream.readline()
    while rest and not rest.strip():
        rest = stream.readline()
    stream.seek(place)
    return not rest
