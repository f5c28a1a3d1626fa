"""What a structure must satisfy before anything is computed with it, and what a data set should."""

from collections.abc import Iterable, Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from equimd.errors import InputError
from equimd.frames.labels import labels_of

MINIMUM_DISTANCE = 0.5
N_CHECKED = 64  # frames of a file that are looked at
COINCIDENT_DISTANCE = 0.01
_PAIR_LIMIT = 1500
_MANY = 10  # frames
_SMALL = (0.005, 0.08)  # eV/Å: 0.3 to 4 eV/Å in Hartree/Bohr


def check_structure(atoms: Atoms, species: Sequence[int] | None = None) -> None:
    """Refuse a structure that no potential can say anything sensible about.

    Args:
        atoms: The structure.
        species: Atomic numbers that the potential knows; None accepts every element.

    Raises:
        InputError: if it is empty, has positions or cell vectors of periodic directions that are not finite, has an
            element that is not in `species`, is periodic without a volume, has two atoms within 0.01 Å of each other,
            or a cell so small that atoms overlap their own periodic images.
    """
    if len(atoms) == 0:
        raise InputError("the structure is empty (0 atoms); accepted: 1 or more")
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if bad.size:
        raise InputError(f"the position of atom {bad[0]} is {atoms.positions[bad[0]]}; accepted: finite numbers")
    periodic = np.asarray(atoms.pbc, dtype=bool)
    vectors = atoms.cell.array[periodic]  # what other directions say is ignored
    if not np.isfinite(vectors).all():
        raise InputError(f"the cell is {atoms.cell.array.tolist()}; accepted: finite numbers")
    check_species(atoms.numbers, species)
    if periodic.any() and np.linalg.matrix_rank(vectors, tol=1e-6) < len(vectors):
        raise InputError(f"periodic along {periodic.tolist()} but the cell is {atoms.cell.array.tolist()}")
    pair, distance = closest_pair(atoms)
    if distance < COINCIDENT_DISTANCE:
        raise InputError(
            f"atoms {pair[0]} and {pair[1]} are {distance:.2g} Å apart; accepted: {COINCIDENT_DISTANCE} Å or more"
        )
    from equimd.neighbors import check_images

    check_images(atoms.numbers, atoms.cell.array, atoms.pbc)


def check_species(numbers: np.ndarray, species: Sequence[int] | None = None) -> None:
    """Refuse numbers that are no atomic numbers, and elements that are not in `species`."""
    present = set(np.unique(numbers).tolist())
    impossible = sorted(number for number in present if not 1 <= number < len(chemical_symbols))
    if impossible:
        raise InputError(f"atomic number {impossible[0]} is no element; accepted: 1 to {len(chemical_symbols) - 1}")
    unknown = sorted(present - set(species)) if species is not None else []
    if unknown:
        known = ", ".join(chemical_symbols[number] for number in sorted(species or ()))
        names = ", ".join(chemical_symbols[number] for number in unknown)
        raise InputError(f"element {names} is unknown to the potential; accepted: {known}")


def closest_pair(atoms: Atoms) -> tuple[tuple[int, int], float]:
    """The two atoms closest to each other and their distance (Å); an infinite distance where it exceeds 1 Å or so.

    Periodic images count, those of an atom itself included.
    """
    n = len(atoms)
    periodic = bool(atoms.pbc.any())
    if n < 2 and not periodic:
        return (0, 0), float("inf")
    if not periodic and n <= _PAIR_LIMIT:
        difference = atoms.positions[:, None, :] - atoms.positions[None, :, :]
        squared = (difference**2).sum(axis=-1)
        squared[np.diag_indices(n)] = np.inf
        i, j = np.unravel_index(squared.argmin(), squared.shape)
        return (int(i), int(j)), float(np.sqrt(squared[i, j]))
    from equimd.neighbors import neighbor_list, used_cell

    cell = used_cell(atoms.cell.array, atoms.pbc)
    edges, shifts = neighbor_list(atoms.positions, cell, atoms.pbc, 1.2)
    if edges.shape[1] == 0:
        return (0, 0), float("inf")
    vectors = atoms.positions[edges[1]] - atoms.positions[edges[0]] + shifts @ cell
    distances = np.linalg.norm(vectors, axis=1)
    edge = int(distances.argmin())
    return (int(edges[0, edge]), int(edges[1, edge])), float(distances[edge])


def check_plausible(frames: Iterable[Atoms], indices: Sequence[int] | None = None) -> list[str]:
    """Warnings, one line each, about labels and distances that look as if their units were others; empty if none do.

    They name frames by ``indices``, or count them.

    Thresholds: forces of thermal structures near equilibrium have an RMS of 0.3 to 4 eV/Å (the same number in kcal/mol
    per Å is 23 times as large), stresses stay below 1.5 eV/Å³ (240 GPa), energies per atom lie between that of all
    electrons, −20.9 Z^(7/3) eV (Thomas-Fermi, Z averaged over atoms), and +50 eV, and bonds above 0.5 Å.
    """
    frames = list(frames)
    squares: list[float] = []
    components: list[int] = []
    energies: list[float] = []
    lowest: list[float] = []
    with_energy: list[int] = []
    stress = 0.0
    virial_ratios: list[float] = []
    images = ""
    closest = (float("inf"), 0)
    for place, atoms in enumerate(frames):
        index = place if indices is None else indices[place]
        distance = closest_pair(atoms)[1] if np.isfinite(atoms.positions).all() else 0.0
        closest = min(closest, (distance, index))
        images = images or _image_message(atoms, index)
        labels = labels_of(atoms)
        if labels["forces"] is not None and len(atoms) > 1:
            squares.append(float((labels["forces"] ** 2).sum()))
            components.append(labels["forces"].size)
        if labels["energy"] is not None and len(atoms):
            with_energy.append(index)
            energies.append(labels["energy"] / len(atoms))
            lowest.append(-22.0 * float((atoms.numbers.astype(float) ** (7 / 3)).mean()) - 20.0)
        if labels["stress"] is not None:
            stress = max(stress, float(np.nanmax(np.abs(labels["stress"]), initial=0.0)))
            if atoms.info.get("stress_from") == "virial" and labels["forces"] is not None:
                force = float(np.sqrt((labels["forces"] ** 2).mean()))
                work = float(np.nanmax(np.abs(labels["stress"]), initial=0.0)) * atoms.cell.volume / len(atoms)
                if force > 0.05:
                    virial_ratios.append(work / force)
    messages = _energy_messages(np.array(energies), np.array(lowest), with_energy)
    if components:
        messages += _force_messages(np.array(squares), np.array(components), frames)
    if stress > 1.5:
        messages.append(
            f"the largest stress component is {stress:.3g} eV/Å³ ({stress * 160.2:.0f} GPa): is it in kbar or GPa?"
            " VASP gives kbar, the opposite sign and the order xx yy zz xy yz zx;"
            ' see UnitSpec(stress="kbar"), LabelKeys(voigt="vasp", stress_sign=-1)'
        )
    if virial_ratios and max(virial_ratios) < 0.02:
        messages.append(
            "the virial is far smaller than the forces suggest: is it a stress? see LabelKeys(stress='virial')"
        )
    if images:
        messages.append(images)
    if closest[0] < MINIMUM_DISTANCE:
        messages.append(f"two atoms of frame {closest[1]} are {closest[0]:.3g} Å apart: are positions in nm or Bohr?")
    return messages


def _image_message(atoms: Atoms, index: int) -> str:
    """About a cell that is smaller than an atom, or of no use at all."""
    from equimd.neighbors import check_images

    try:
        check_images(atoms.numbers, atoms.cell.array, atoms.pbc)
    except InputError as error:
        return f"frame {index}: {error}"
    return ""


def _force_messages(squares: np.ndarray, components: np.ndarray, frames: list[Atoms]) -> list[str]:
    rms = float(np.sqrt(squares.sum() / components.sum()))
    if rms > 12.0:
        return [
            f"the force RMS is {rms:.3g} eV/Å: is it in kcal/mol/Å (then {rms / 23.06:.3g} eV/Å)"
            ' or kJ/mol/nm? see UnitSpec(energy="kcal/mol")'
        ]
    # Thermal forces in Hartree/Bohr are alike in all frames, where those of relaxed ones differ by orders of magnitude,
    # and far too small for how much the bonds differ; a few relaxed structures are no cause for alarm.
    alike = float(np.median(np.sqrt(squares / components))) > rms / 4.0
    if len(squares) >= _MANY and _SMALL[0] < rms < _SMALL[1] and alike:
        from equimd.frames.stiffness import LEAST, bond_stiffness

        found = bond_stiffness(frames)
        if found is not None and found[0] < LEAST and found[1] >= _MANY:
            return [
                f"the force RMS of {len(squares)} frames is {rms:.2g} eV/Å, which is too small for how much their bonds"
                f" differ: is it in Hartree/Bohr (then {rms * 51.4:.2g} eV/Å)?"
                ' see UnitSpec(energy="Hartree", length="Bohr")'
            ]
    return []


def _energy_messages(per_atom: np.ndarray, lowest: np.ndarray, indices: Sequence[int]) -> list[str]:
    if per_atom.size == 0:
        return []
    if (per_atom < lowest).any() or (per_atom > 50.0).any():
        worst = int((per_atom / lowest).argmax()) if (per_atom < lowest).any() else int(per_atom.argmax())
        return [
            f"the energy of frame {indices[worst]} is {per_atom[worst]:.4g} eV per atom: is it in kcal/mol or kJ/mol?"
            ' see UnitSpec(energy="kcal/mol")'
        ]
    return []
