"""The atoms of a trajectory: their elements, masses and names, from a file of their own; and parts of them by name."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import atomic_masses

from equimd.errors import InputError

# Words of mdtraj's selection language that need no names of atoms, residues or chains.
_WORDS_FOR_ELEMENTS = {"all", "everything", "none", "nothing", "element", "symbol", "type", "index", "mass"}
_WORDS_FOR_ELEMENTS |= {"and", "or", "not", "to", "in", "lt", "le", "gt", "ge", "eq", "ne"}


class Site(NamedTuple):
    """Where an atom is in a biopolymer: its name, and the name, number and chain of its residue."""

    name: str
    residue: str
    number: str
    chain: str


@dataclass(frozen=True)
class Topology:
    """Atomic numbers (N,); masses (N,) in u if the file states them; sites, or a topology of mdtraj's, if it has names.

    `where` names the file in messages.
    """

    numbers: np.ndarray
    where: str
    masses: np.ndarray | None = None
    sites: list[Site] | None = None
    stored: Any = None

    def for_mdtraj(self) -> Any:
        """The same as a topology of mdtraj's; atoms without sites are one residue."""
        if self.stored is not None:
            return self.stored
        import mdtraj

        topology, chain, residue, last = mdtraj.Topology(), None, None, None
        sites = self.sites or [Site(f"X{k}", "MOL", "1", "") for k in range(len(self.numbers))]
        for site, number in zip(sites, self.numbers.tolist(), strict=True):
            if chain is None or last is None or site.chain != last.chain:
                chain, residue = topology.add_chain(site.chain or None), None
            if residue is None or last is None or site[1:] != last[1:]:
                residue = topology.add_residue(site.residue, chain, _residue_number(site.number))
            topology.add_atom(site.name, mdtraj.element.Element.getByAtomicNumber(number), residue)
            last = site
        return topology

    def select(self, expression: str) -> np.ndarray:
        """Indices of the atoms that an expression of mdtraj's selection language names, in ascending order.

        Raises:
            InputError: if it cannot be parsed, selects no atom, or asks for names that the file does not have.
        """
        named = self.sites is not None or self.stored is not None
        words = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'|\"[^\"]*\"", "", expression)))
        if not named and (odd := sorted(words - _WORDS_FOR_ELEMENTS - _symbols())):
            raise InputError(
                f"{self.where}: select is {expression!r}, but the file has no names of atoms or residues ({odd[0]});"
                " accepted: element and index, or topology=... with names (PDB, mmCIF, GRO, prmtop)"
            )
        try:
            chosen = np.asarray(self.for_mdtraj().select(expression), dtype=np.int64)
        except Exception as error:  # mdtraj's parser raises whatever it stumbles over
            what = f"select is {expression!r}, which mdtraj cannot parse ({' '.join(str(error).split())[:80]})"
            raise InputError(f"{self.where}: {what}; accepted: for example 'not water', 'resname LIG'") from error
        if not chosen.size:
            raise InputError(f"{self.where}: select is {expression!r}, which no atom fits; accepted: one or more atoms")
        return np.sort(chosen)


def topology_of(atoms: Atoms, where: str) -> Topology:
    """The topology of a frame; PDB's names are in its arrays."""
    masses = atoms.get_masses() if atoms.has("masses") else None
    return Topology(atoms.numbers.copy(), where, masses)


def from_mdtraj(topology: Any, where: str) -> Topology:
    """A topology that mdtraj has read.

    Raises:
        InputError: if an atom has no element.
    """
    numbers = [atom.element.atomic_number if atom.element is not None else 0 for atom in topology.atoms]
    if min(numbers, default=0) < 1:
        atom = numbers.index(min(numbers)) if numbers else 0
        raise InputError(f"{where}: atom {atom} of the topology has no element; accepted: real atoms only")
    return Topology(np.array(numbers), where, stored=topology)


def load_with_mdtraj(path: Path) -> Topology:
    """A topology file that mdtraj reads: prmtop, psf, mol2, ...

    Raises:
        InputError: if it cannot.
    """
    import mdtraj

    try:
        topology = mdtraj.load_topology(str(path))
    except Exception as error:  # mdtraj's readers raise whatever they stumble over
        raise InputError(f"{path}: mdtraj cannot read it as a topology ({str(error)[:200]})") from error
    return from_mdtraj(topology, str(path))


def with_masses(atoms: Atoms, masses: np.ndarray | None) -> Atoms:
    """The frame, with masses (u) if there are any that are not those of its elements."""
    if masses is not None and not np.array_equal(masses, atomic_masses[atoms.numbers]):
        atoms.set_masses(masses)  # pyright: ignore
    return atoms


def _residue_number(text: str) -> int | None:
    """Residue numbers beyond 9999 may be hexadecimal; with an insertion code, or without a number, mdtraj counts."""
    try:
        return int(text)
    except ValueError:
        return None


def _symbols() -> set[str]:
    from ase.data import chemical_symbols

    return set(chemical_symbols) | {symbol.upper() for symbol in chemical_symbols}
