"""PDB files of any number of models, each with its box (https://www.wwpdb.org/documentation/file-format).

Elements come from columns 77-78, or from names that allow no other (see `atom_names`). Of alternate locations the first
of a residue is taken. CRYST1 holds until the next one: OpenMM, mdtraj and MDAnalysis write it once, GROMACS for every
model. A box of 1 Å is the dummy of files without one.
"""

import gzip
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.geometry import cellpar_to_cell

from equimd.errors import InputError
from equimd.frames.atom_names import element_of, masses_of_symbols, number_of_symbol
from equimd.frames.topology import Site, Topology, with_masses

LOSSY = "pdb: positions rounded to 0.001 Å, cell orientation lost"
_ATOMS = ("ATOM  ", "HETATM")
_CHARGE = re.compile(r"(\d)([+-])")
_TIME = re.compile(r"\bt\s*=\s*([-+.\deE]+)")


class PdbTrajectory:
    """The models of one file, `.gz` too; `topology`, if given, has the elements."""

    def __init__(self, path: Path, topology: Topology | None = None):
        self.path, self._topology = path, topology
        self._noticed: set[str] = set()

    def count(self) -> int:
        """Number of models."""
        return sum(1 for _ in self._models())

    def frames(self) -> Iterator[Atoms]:
        """Models in Å, with `info["lossy"]`, and `info["time_fs"]` if the title has `t=` in ps, as GROMACS writes it.

        Raises:
            InputError: if the file is damaged, has no atoms, or an atom no element.
        """
        last: tuple[list[tuple], Topology] | None = None
        for index, (lines, box, time) in enumerate(self._models()):
            where = f"{self.path}, model {index}"
            try:
                positions = [[float(line[30:38]), float(line[38:46]), float(line[46:54])] for line in lines]
            except ValueError as error:
                raise InputError(f"{where}: {error}; accepted: coordinates in columns 31 to 54") from None
            keys = [(line[12:27], line[76:78]) for line in lines]
            if last is None or keys != last[0]:
                last = keys, self._read_topology(lines, where)
            topology = last[1]
            atoms = with_masses(Atoms(topology.numbers, positions=positions), topology.masses)
            if box is not None:
                atoms.set_cell(box)
                atoms.pbc = True
            charges = [_formal_charge(line) for line in lines]
            if any(charges):
                atoms.set_initial_charges(charges)
            atoms.info["lossy"] = LOSSY
            if time is not None:
                atoms.info["time_fs"] = 1000.0 * time
            yield atoms

    def topology(self) -> Topology:
        """Elements and names of the first model."""
        for lines, _, _ in self._models():
            return self._read_topology(lines, str(self.path))
        raise InputError(f"{self.path}: holds no atoms; accepted: ATOM and HETATM records")

    def _models(self) -> Iterator[tuple[list[str], np.ndarray | None, float | None]]:
        """Lines of the atoms, cell (3, 3) and time (ps) of each model."""
        lines: list[str] = []
        box, time, n_boxes, n_models = None, None, 0, 0
        with _open(self.path) as stream:
            try:
                for line in stream:
                    record = line[:6].ljust(6)
                    if record in _ATOMS:
                        lines.append(line.rstrip("\n"))
                    elif record == "CRYST1":
                        before, box, n_boxes = box, self._box(line), n_boxes + 1
                        if n_boxes > 1 and (before is None) != (box is None):
                            self._notice("has models with a box and models with the dummy of none")
                    elif record == "TITLE " and (found := _TIME.search(line)):
                        time = float(found[1])
                    elif record.rstrip() in ("END", "ENDMDL", "MODEL") and lines:
                        yield self._first_locations(lines), box, time
                        lines, time, n_models = [], None, n_models + 1
                        if n_models == 2 and n_boxes == 1 and box is not None:
                            self._notice("names its box once: it is taken for every model")
            except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
                raise InputError(f"{self.path}: cannot be read ({error}); accepted: a whole PDB file") from error
        if lines:
            yield self._first_locations(lines), box, time

    def _box(self, line: str) -> np.ndarray | None:
        try:
            lengths = [float(line[start : start + 9]) for start in (6, 15, 24)]
            angles = [float(line[start : start + 7]) for start in (33, 40, 47)]
        except ValueError:
            raise InputError(f"{self.path}: {line.strip()[:60]!r}; accepted: six numbers after CRYST1") from None
        return box_vectors(lengths, angles, str(self.path))

    def _first_locations(self, lines: list[str]) -> list[str]:
        """The atoms without alternate locations, and of those with them the first location of each residue."""
        if all(line[16:17] in " " for line in lines):
            return lines
        self._notice("has alternate locations: the first of each residue is taken")
        first: dict[str, str] = {}
        kept = []
        for line in lines:
            location = line[16:17].strip()
            if not location or first.setdefault(line[21:27], location) == location:
                kept.append(line)
        return kept

    def _notice(self, what: str) -> None:
        if what not in self._noticed:
            self._noticed.add(what)
            logging.getLogger("equimd").warning("%s %s", self.path, what)

    def _read_topology(self, lines: list[str], where: str) -> Topology:
        sites = [_site(line) for line in lines]
        if self._topology is not None:
            self._check_count(len(lines), where)
            return Topology(self._topology.numbers, where, self._topology.masses, sites)
        symbols = [line[76:78].strip() for line in lines]
        numbers = [
            number_of_symbol(symbol) if symbol else element_of(site.name, site.residue)
            for symbol, site in zip(symbols, sites, strict=True)
        ]
        if None in numbers:
            atom = numbers.index(None)
            site, symbol = sites[atom], symbols[atom]
            what = f"has the element {symbol!r}" if symbol else "has no element in columns 77-78"
            raise InputError(
                f"{where}: atom {atom} ({site.name} of {site.residue} {site.number}) {what}; accepted: a chemical"
                " symbol there, or topology=... with the elements"
            )
        array = np.array(numbers, dtype=np.int64)
        return Topology(array, where, masses_of_symbols(symbols, array), sites)

    def _check_count(self, n_atoms: int, where: str) -> None:
        assert self._topology is not None
        if len(self._topology.numbers) != n_atoms:
            raise InputError(f"{where}: {n_atoms} atoms, but {self._topology.where} has {len(self._topology.numbers)}")


def box_vectors(lengths: Any, angles: Any, where: str) -> np.ndarray | None:
    """Cell (3, 3) of lengths (Å) and angles (degrees); None for a dummy of 1 Å or of nothing.

    Raises:
        InputError: if there is no such cell.
    """
    if all(length in (0.0, 1.0) for length in lengths):
        return None
    cell = cellpar_to_cell([*lengths, *angles]) if min(lengths) > 0 and 0 < min(angles) <= max(angles) < 180 else np.nan
    if not np.isfinite(cell).all():
        shown = ", ".join(f"{value:g}" for value in (*lengths, *angles))
        raise InputError(f"{where}: the box is {shown}; accepted: positive lengths and angles that close a cell")
    return np.asarray(cell)


def _formal_charge(line: str) -> int:
    """Columns 79-80, such as ``1+`` or ``2-``; 0 if they hold anything else, as files of old do."""
    found = _CHARGE.fullmatch(line[78:80])
    return 0 if found is None else int(found[1]) * (1 if found[2] == "+" else -1)


def _site(line: str) -> Site:
    return Site(line[12:16].strip(), line[17:21].strip(), line[22:27].strip(), line[21:22].strip())


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
