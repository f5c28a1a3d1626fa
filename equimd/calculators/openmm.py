"""Potentials in OpenMM, through openmmml's entry point and ``openmm.PythonForce``; see docs/openmm.md.

``MLPotential("equimd", modelPath="alanine-dipeptide-equivariant").createSystem(topology, precision="single")`` works
without an import of ours. OpenMM demands box vectors in reduced form, which turns most cells; a potential without
rotational symmetry would change its answer. ``engine_frame`` gives the reduced box and the rotation, and
``createSystem(topology, rotation=R)`` evaluates in the user's frame.
"""

import copy
import difflib
import math
import operator
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openmm import PythonForce, System
from openmm.app import Topology
from openmmml.embeddings.mechanicalembedding import MechanicalEmbedding
from openmmml.mlpotential import MLPotentialImpl

from equimd.calculators.openmm_force import EquimdForce
from equimd.errors import InputError

if TYPE_CHECKING:
    import torch

    from equimd.models.potential import Potential

__all__ = ["EquimdForce", "EquimdPotentialImpl", "engine_frame"]

_PRECISIONS = {"single": "float32", "double": "float64"}
_ENERGY_TYPES = ("energy", "interaction_energy")
_OPTIONS = (
    "precision",
    "device",
    "returnEnergyType",
    "rotation",
    "symmetrize",
    "skin",
    "selfCheck",
    "charge",
    "multiplicity",
)
# Names from elsewhere for what we call otherwise.
_OTHER_NAMES = {"dtype": "precision", "spin": "multiplicity", "totalspin": "multiplicity", "totalcharge": "charge"}
_OTHER_NAMES |= {"netcharge": "charge", "interactionenergy": "returnEnergyType"}
_SINGULAR = 1e-10  # of the volume of an orthogonal cell: less is what rounding leaves of dependent vectors


class EquimdPotentialImpl(MLPotentialImpl):
    """Adds a PythonForce for the whole system or for a subset of its atoms."""

    def __init__(self, model: "str | Path | Potential") -> None:
        self.model = model

    def addForces(
        self,
        topology: Topology,
        system: System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        precision: str | None = "single",
        device: "str | torch.device | None" = "auto",
        returnEnergyType: str = "energy",
        rotation: np.ndarray | None = None,
        symmetrize: Any = None,
        skin: float = 0.5,
        selfCheck: bool = True,
        charge: float | None = None,
        multiplicity: float | None = None,
        **args: Any,
    ) -> None:
        """Add the force; called by ``createSystem`` and ``createMixedSystem``.

        Args:
            topology: Says which elements, and whether anything is periodic.
            system: Receives the force; counts as periodic, too, if one of its forces is.
            atoms: Indices of the atoms the potential sees; None for all.
            forceGroup: Group of the force.
            precision: "single" or "double"; None is "single".
            device: "auto", "cpu", "cuda", "cuda:1", … or a torch.device; None is "auto".
            returnEnergyType: "energy" contains the isolated atoms, as ASE's does; "interaction_energy" does not.
            rotation: Proper or improper R (3, 3) from the user's frame to the engine's (see ``engine_frame``); the
                potential is evaluated in the user's.
            symmetrize: As for EquimdCalculator.
            skin: Width of the Verlet skin in Å.
            selfCheck: Check the potential now, as EquimdCalculator does, and wherever a copy of the force loads it.
            charge: Total charge in e; refused if the potential was trained on another.
            multiplicity: 2S + 1; refused if the potential was trained on another.
            args: Options of openmmml and of its embeddings, which are ignored.

        Raises:
            InputError: for a bad value, an option that is nearly one of these, indices that are not those of atoms, an
                element that is not known, a site without an element, or a charge that the potential was not trained on.
        """
        _refuse_near_misses(args)
        precision = "single" if precision is None else precision
        if precision not in _PRECISIONS:
            raise InputError(f"precision is {precision!r}; accepted are {' and '.join(_PRECISIONS)}")
        if returnEnergyType not in _ENERGY_TYPES:
            raise InputError(f"returnEnergyType is {returnEnergyType!r}; accepted are {' and '.join(_ENERGY_TYPES)}")
        if not (isinstance(skin, Real) and 0 <= skin < math.inf):
            raise InputError(f"skin is {skin!r}; a number of Å, zero or more, is accepted")
        n_atoms = topology.getNumAtoms()
        if system.getNumParticles() not in (0, n_atoms):  # openmmml adds ours to an empty system before it interpolates
            raise InputError(f"the topology has {n_atoms} atoms and the system {system.getNumParticles()} particles")
        indices = None if atoms is None else _checked_indices(atoms, n_atoms)
        periodic = topology.getPeriodicBoxVectors() is not None or system.usesPeriodicBoundaryConditions()
        # In OpenMM 8.6.1 a force that is not periodic gets wrong positions of a subset if the system is: it gets all.
        ours = indices is not None and not periodic
        compute = EquimdForce(
            self.model,
            _numbers(topology, indices),
            particles=np.array(indices) if ours else None,
            device="auto" if device is None else str(device),
            dtype=_PRECISIONS[precision],
            periodic=periodic,
            rotation=None if rotation is None else _checked_rotation(rotation),
            symmetrize=symmetrize,
            skin=float(skin),
            interaction_energy=returnEnergyType == "interaction_energy",
            self_check=bool(selfCheck),
            electrons={"charge": _number("charge", charge), "multiplicity": _number("multiplicity", multiplicity)},
        )
        compute.prepare()
        force = PythonForce(compute)
        force.setName("EquimdForce")
        force.setForceGroup(forceGroup)
        force.setUsesPeriodicBoundaryConditions(periodic)
        if indices is not None and not ours:
            force.setParticles(indices)
        system.addForce(force)

    def createMixedSystem(
        self,
        topology: Topology,
        system: System,
        atoms: list[int],
        forceGroup: int,
        interpolate: bool,
        embedding: str,
        returnInfo: bool = False,
        **args: Any,
    ) -> System | dict[str, Any]:
        """openmmml's mechanical embedding of a subset that is periodic if the system is, interpolated or not.

        For interpolation openmmml adds our force to an empty system, where only the topology says what is periodic.
        """
        indices = _checked_indices(atoms, topology.getNumAtoms())
        if topology.getPeriodicBoxVectors() is None and system.usesPeriodicBoundaryConditions():
            topology = copy.deepcopy(topology)
            topology.setPeriodicBoxVectors(system.getDefaultPeriodicBoxVectors())
        return MechanicalEmbedding().createMixedSystem(
            self, topology, system, indices, forceGroup, interpolate, returnInfo=returnInfo, **args
        )

    def getSupportedEmbeddings(self) -> list[str]:
        """The embedding that is done here."""
        return ["mechanical"]

    def getMLLongRange(self) -> bool:
        """Interactions end at the cutoff."""
        return False


def engine_frame(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box vectors (3, 3) in OpenMM's reduced form and the rotation R (3, 3) that takes the user's frame to theirs.

    The box spans the same lattice as ``cell @ R.T``; positions go to the engine as ``positions @ R.T``, same unit.
    Left-handed cells are inverted first (the lattice stays), so R is always proper. Raises InputError for a cell
    without a volume.
    """
    cell = np.asarray(cell, dtype=np.float64)
    volume = np.linalg.det(cell) if cell.shape == (3, 3) and np.isfinite(cell).all() else 0.0
    if not abs(volume) > _SINGULAR * np.linalg.norm(cell, axis=-1).prod():
        raise InputError(f"cell is {cell.tolist()}; three linearly independent vectors are accepted")
    right_handed = cell * np.sign(volume)
    # cell = L Q with L lower triangular: QR of the transpose.
    q, r = np.linalg.qr(right_handed.T)
    signs = np.sign(np.diag(r))
    box, rotation = np.tril(r.T * signs), (q * signs).T
    for row, column in ((2, 1), (2, 0), (1, 0)):
        box[row] -= box[column] * np.round(box[row, column] / box[column, column])
    for row, column in ((2, 1), (2, 0), (1, 0)):  # OpenMM accepts half a vector, and not a rounding error more
        half = 0.5 * box[column, column]
        box[row, column] = np.clip(box[row, column], -half, half)
    return box, rotation


def _refuse_near_misses(args: dict[str, Any]) -> None:
    """Refuse what was probably meant for us; openmmml and its embeddings have options of their own."""
    plain = {name.lower(): name for name in _OPTIONS} | _OTHER_NAMES
    for name in args:
        near = difflib.get_close_matches(name.lower().replace("_", ""), plain, n=1, cutoff=0.75)
        if near:
            raise InputError(
                f"createSystem got {name}; did you mean {plain[near[0]]}? accepted are {', '.join(_OPTIONS)}, and what "
                "openmmml itself accepts"
            )


def _checked_indices(atoms: Iterable[int], n_atoms: int) -> list[int]:
    """Indices as integers; refused unless each is that of an atom and comes once."""
    indices = []
    for k in atoms:
        try:
            index = -1 if isinstance(k, bool | np.bool_) else operator.index(k)
        except TypeError:
            index = -1
        if not 0 <= index < n_atoms:
            raise InputError(f"atoms holds {k!r}; accepted are whole numbers from 0 to {n_atoms - 1}")
        indices.append(index)
    if len(set(indices)) < len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise InputError(f"atoms holds {twice} more than once; each atom is accepted once")
    if not indices:
        raise InputError("atoms is empty; at least one atom is accepted, or None for all")
    return indices


def _number(name: str, value: Any) -> float | None:
    if value is not None and not isinstance(value, Real):
        raise InputError(f"{name} is {value!r}; a number or None is accepted")
    return value if value is None else float(value)


def _numbers(topology: Topology, indices: list[int] | None) -> np.ndarray:
    everything = list(topology.atoms())
    chosen = everything if indices is None else [everything[k] for k in indices]
    for atom in chosen:
        if atom.element is None:
            raise InputError(f"atom {atom.index} ({atom.name}) has no element; virtual sites are not accepted")
    return np.array([atom.element.atomic_number for atom in chosen], dtype=np.int64)


def _checked_rotation(rotation: Any) -> np.ndarray:
    try:
        matrix = np.asarray(rotation, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != (3, 3) or not np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-8):
        raise InputError(f"rotation is {np.asarray(rotation).tolist()}; an orthogonal 3×3 matrix is accepted")
    return matrix
