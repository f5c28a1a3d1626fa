"""Potentials in OpenMM, through openmmml's entry point and ``openmm.PythonForce``.

``MLPotential("equimd", modelPath="alanine-dipeptide-equivariant").createSystem(topology, precision="single")`` works
without an import of ours. OpenMM demands box vectors in reduced form, which turns most cells; a potential without
rotational symmetry would change its answer. ``engine_frame`` gives the reduced box and the rotation, and
``createSystem(topology, rotation=R)`` evaluates in the user's frame.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openmm import PythonForce, State, System, unit
from openmm.app import Topology
from openmmml.mlpotential import MLPotentialImpl

from equimd.errors import InputError
from equimd.rotations import rotate_back_vectors, rotate_vectors
from equimd.units import KJ_PER_MOL, NM

if TYPE_CHECKING:
    from equimd.calculators.evaluator import Evaluator
    from equimd.models.potential import Potential

_PRECISIONS = {"single": "float32", "double": "float64"}
_ENERGY_TYPES = ("energy", "interaction_energy")


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
        precision: str = "single",
        returnEnergyType: str = "energy",
        rotation: np.ndarray | None = None,
        symmetrize: Any = None,
        skin: float = 0.5,
        selfCheck: bool = True,
        **args: Any,
    ) -> None:
        """Add the force; called by ``createSystem`` and ``createMixedSystem``.

        Args:
            topology: Says which elements, and whether anything is periodic.
            system: Receives the force; counts as periodic, too, where one of its forces is.
            atoms: Indices of the atoms the potential sees; None for all.
            forceGroup: Group of the force.
            precision: "single" or "double".
            returnEnergyType: "energy" contains the isolated atoms, as ASE's does; "interaction_energy" does not.
            rotation: Proper or improper R (3, 3) from the user's frame to the engine's (see ``engine_frame``); the
                potential is evaluated in the user's.
            symmetrize: As for EquimdCalculator.
            skin: Width of the Verlet skin in Å.
            selfCheck: Check the potential now, as EquimdCalculator does.
            args: device ("auto", "cpu", "cuda", or a torch.device), charge, multiplicity.

        Raises:
            InputError: for an option or an element that is not known, a site without an element, or a charge that the
                potential was not trained on.
        """
        device = str(args.pop("device", "auto"))
        electrons = {key: args.pop(key) for key in ("charge", "multiplicity") if key in args}
        if args:
            raise InputError(
                f"createSystem got {', '.join(sorted(args))}; accepted are precision, device, returnEnergyType, "
                "rotation, symmetrize, skin, selfCheck, charge, multiplicity"
            )
        if precision not in _PRECISIONS:
            raise InputError(f"precision is {precision!r}; accepted are {' and '.join(_PRECISIONS)}")
        if returnEnergyType not in _ENERGY_TYPES:
            raise InputError(f"returnEnergyType is {returnEnergyType!r}; accepted are {' and '.join(_ENERGY_TYPES)}")
        indices = None if atoms is None else [int(k) for k in atoms]
        periodic = topology.getPeriodicBoxVectors() is not None or system.usesPeriodicBoundaryConditions()
        compute = EquimdForce(
            self.model,
            _numbers(topology, indices),
            device=device,
            dtype=_PRECISIONS[precision],
            periodic=periodic,
            rotation=None if rotation is None else _checked_rotation(rotation),
            symmetrize=symmetrize,
            skin=skin,
            interaction_energy=returnEnergyType == "interaction_energy",
        )
        compute.prepare(selfCheck, electrons)
        force = PythonForce(compute)
        force.setName("EquimdForce")
        force.setForceGroup(forceGroup)
        force.setUsesPeriodicBoundaryConditions(periodic)
        if indices is not None:
            force.setParticles(indices)
        system.addForce(force)

    def getMLLongRange(self) -> bool:
        """Interactions end at the cutoff."""
        return False


class EquimdForce:
    """The function inside the PythonForce: a State in, energy (kJ/mol, a float) and forces (N, 3) (kJ/mol/nm) out.

    OpenMM asks for energy and forces separately; the second question at the same positions is answered from memory.
    Pickled without the potential, which is loaded again by its name or path on the first call.
    """

    def __init__(
        self,
        model: "str | Path | Potential",
        numbers: np.ndarray,
        *,
        device: str = "auto",
        dtype: str = "float32",
        periodic: bool = False,
        rotation: np.ndarray | None = None,
        symmetrize: Any = None,
        skin: float = 0.5,
        interaction_energy: bool = False,
    ) -> None:
        if isinstance(model, str | Path) and Path(model).exists():
            model = str(Path(model).resolve())  # so that it is found from another folder
        self.model, self.numbers = str(model) if isinstance(model, Path) else model, numbers
        self.device, self.dtype, self.periodic = device, dtype, periodic
        self.rotation, self.symmetrize, self.skin = rotation, symmetrize, skin
        self.interaction_energy = interaction_energy
        self._evaluator: Evaluator | None = None
        self._last: tuple[np.ndarray, np.ndarray, float, np.ndarray] | None = None

    def prepare(self, self_check: bool = False, electrons: dict[str, float] | None = None) -> "Evaluator":
        """Load the potential, check it and the atoms it is meant for."""
        from equimd.calculators.evaluator import Evaluator
        from equimd.calculators.loading import resolve, symmetrized
        from equimd.frames.electrons import check_electrons

        base, _, header = resolve(self.model, self.device, self.dtype)
        if self_check:
            from equimd.models.selfcheck import self_check as check

            check(base).raise_if_failed()
        check_electrons(header, **(electrons or {}))
        evaluator = Evaluator(symmetrized(base, self.symmetrize), self.skin)
        evaluator.check_numbers(self.numbers)
        self._evaluator = evaluator
        return evaluator

    def __call__(self, state: State) -> tuple[float, np.ndarray]:
        """Energy and forces at the positions (and box vectors) of ``state``."""
        positions = _in_angstrom(state.getPositions(asNumpy=True))
        cell = np.zeros((3, 3))
        if self.periodic:
            cell = _in_angstrom(state.getPeriodicBoxVectors(asNumpy=True))
        last = self._last
        if last is None or not (np.array_equal(last[0], positions) and np.array_equal(last[1], cell)):
            energy, forces = self._compute(positions, cell)
            last = self._last = (np.array(positions), np.array(cell), energy, forces)
        return last[2], last[3].copy()

    def _compute(self, positions: np.ndarray, cell: np.ndarray) -> tuple[float, np.ndarray]:
        from equimd.calculators.evaluator import Structure

        evaluator = self._evaluator or self.prepare()
        if self.rotation is not None:
            positions, cell = rotate_back_vectors(positions, self.rotation), rotate_back_vectors(cell, self.rotation)
        outcome = evaluator.evaluate(Structure(positions, self.numbers, cell, np.full(3, self.periodic)))
        forces = outcome.forces if self.rotation is None else rotate_vectors(outcome.forces, self.rotation)
        energy = outcome.energy - (evaluator.isolated_energy(self.numbers) if self.interaction_energy else 0.0)
        return float(energy / KJ_PER_MOL), np.ascontiguousarray(forces * (NM / KJ_PER_MOL))

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self.model, str):
            raise TypeError(
                "a force made from a Potential object cannot be serialised; give modelPath a name or a path"
            )
        return {**self.__dict__, "_evaluator": None, "_last": None}


def engine_frame(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box vectors (3, 3) in OpenMM's reduced form and the rotation R (3, 3) that takes the user's frame to theirs.

    The box spans the same lattice as ``cell @ R.T``; positions go to the engine as ``positions @ R.T``, same unit.
    Left-handed cells are inverted first (the lattice stays), so R is always proper.
    """
    cell = np.asarray(cell, dtype=np.float64)
    if cell.shape != (3, 3) or not abs(np.linalg.det(cell)) > 0:
        raise InputError(f"cell is {cell.tolist()}; three linearly independent vectors are accepted")
    right_handed = cell * np.sign(np.linalg.det(cell))
    # cell = L Q with L lower triangular: QR of the transpose.
    q, r = np.linalg.qr(right_handed.T)
    signs = np.sign(np.diag(r))
    box, rotation = (r.T * signs), (q * signs).T
    box[2] -= box[1] * np.round(box[2, 1] / box[1, 1])
    box[2] -= box[0] * np.round(box[2, 0] / box[0, 0])
    box[1] -= box[0] * np.round(box[1, 0] / box[0, 0])
    return np.tril(box), rotation


def _in_angstrom(quantity: Any) -> np.ndarray:
    return NM * np.asarray(quantity.value_in_unit(unit.nanometer))  # type: ignore[attr-defined]


def _numbers(topology: Topology, indices: list[int] | None) -> np.ndarray:
    everything = list(topology.atoms())
    chosen = everything if indices is None else [everything[k] for k in indices]
    for atom in chosen:
        if atom.element is None:
            raise InputError(f"atom {atom.index} ({atom.name}) has no element; virtual sites are not accepted")
    return np.array([atom.element.atomic_number for atom in chosen], dtype=np.int64)


def _checked_rotation(rotation: np.ndarray) -> np.ndarray:
    matrix = np.asarray(rotation, dtype=np.float64)
    if matrix.shape != (3, 3) or not np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-8):
        raise InputError(f"rotation is {matrix.tolist()}; an orthogonal 3×3 matrix is accepted")
    return matrix
