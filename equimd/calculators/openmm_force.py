"""EquimdForce: what OpenMM calls for energy and forces, from one Context or many, from one thread or many.

All Contexts made from one System share this object, and OpenMM may run them in threads (on a GPU each Context has a
thread of its own). The network is shared, since it keeps nothing between calls. Neighbour list, graph and the last
answer belong to the thread that asks.

OpenMM pickles the object wherever it copies a force: XML, ``copy.deepcopy``, ``interpolate=True``, and every Context
with a ``CustomCVForce``. A copy loads the potential at its first call, sees that it is the same one, and repeats all
checks.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equimd.errors import InputError
from equimd.rotations import rotate_back_vectors, rotate_vectors
from equimd.units import KJ_PER_MOL, NM

if TYPE_CHECKING:
    from openmm import State

    from equimd.calculators.evaluator import Evaluator
    from equimd.models.potential import Potential

_MAX_THREADS = 64
"""So many threads keep a neighbour list; those that end leave theirs behind."""


@dataclass
class _Scratch:
    """What one thread keeps from call to call: its neighbour list, and the last question with its answer."""

    evaluator: "Evaluator"
    positions: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))
    cell: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))
    energy: float = 0.0
    forces: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))


class EquimdForce:
    """The function inside the PythonForce: a State in, energy (kJ/mol, a float) and forces (N, 3) (kJ/mol/nm) out.

    OpenMM asks for energy and forces separately; the second question at the same positions and box vectors is answered
    from memory. A pickle holds the name or path of the potential and a fingerprint, or the potential itself if it was
    given as an object.

    Args:
        model: A name, a path, or a Potential (of which a copy is made).
        numbers: Atomic numbers (n,) of the atoms that the potential sees.
        particles: Their indices (n,) if the State holds more atoms; None if it holds just these.
        device: As for EquimdCalculator.
        dtype: As for EquimdCalculator.
        periodic: Whether the State has box vectors that count.
        rotation: R (3, 3) from the user's frame to the engine's, or None.
        symmetrize: As for EquimdCalculator.
        skin: Width of the Verlet skin in Å.
        interaction_energy: Leave out the energies of the isolated atoms.
        self_check: Check the potential wherever it is loaded.
        electrons: charge and multiplicity as the user states them.

    Raises:
        InputError: for a name or path that is no potential.
    """

    def __init__(
        self,
        model: "str | Path | Potential",
        numbers: np.ndarray,
        *,
        particles: np.ndarray | None = None,
        device: str = "auto",
        dtype: str = "float32",
        periodic: bool = False,
        rotation: np.ndarray | None = None,
        symmetrize: Any = None,
        skin: float = 0.5,
        interaction_energy: bool = False,
        self_check: bool = False,
        electrons: dict[str, float | None] | None = None,
    ) -> None:
        self.model = _portable(model)
        self.numbers, self.particles = numbers, particles
        self.device, self.dtype, self.periodic = device, dtype, periodic
        self.rotation, self.symmetrize, self.skin = rotation, symmetrize, skin
        self.interaction_energy = interaction_energy
        self.self_check, self.electrons = self_check, electrons or {}
        self.fingerprint: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._potential: Potential | None = None
        self._scratch: dict[int, _Scratch] = {}

    def prepare(self) -> "Evaluator":
        """Load and check the potential if that is to be done; the evaluator of the thread that asks.

        Raises:
            InputError: for a potential that is not found or is not the one that the pickle was made with, atoms that
                it does not know, or a charge or multiplicity that it was not trained on.
            SelfCheckError: if the potential contradicts itself.
        """
        return self._scratch_of_thread().evaluator

    def __call__(self, state: "State") -> tuple[float, np.ndarray]:
        """Energy and forces at the positions (and box vectors) of ``state``."""
        try:
            return self._answer(state)
        except Exception as error:  # OpenMM passes on the message only
            raise RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    def _answer(self, state: "State") -> tuple[float, np.ndarray]:
        everything = _in_angstrom(state.getPositions(asNumpy=True))
        positions = everything if self.particles is None else everything[self.particles]
        if len(positions) != len(self.numbers):
            raise InputError(
                f"OpenMM gives {len(positions)} positions; the force was made for {len(self.numbers)} atoms"
            )
        cell = np.zeros((3, 3))
        if self.periodic:
            cell = _in_angstrom(state.getPeriodicBoxVectors(asNumpy=True))
        mine = self._scratch_of_thread()
        if not (np.array_equal(mine.positions, positions) and np.array_equal(mine.cell, cell)):
            mine.energy, mine.forces = self._compute(mine.evaluator, positions, cell)
            mine.positions, mine.cell = np.array(positions), np.array(cell)
        if self.particles is None:
            return mine.energy, mine.forces.copy()
        forces = np.zeros_like(everything)
        forces[self.particles] = mine.forces
        return mine.energy, forces

    def _compute(self, evaluator: "Evaluator", positions: np.ndarray, cell: np.ndarray) -> tuple[float, np.ndarray]:
        from equimd.calculators.evaluator import Structure

        if self.rotation is not None:
            positions, cell = rotate_back_vectors(positions, self.rotation), rotate_back_vectors(cell, self.rotation)
        outcome = evaluator.evaluate(Structure(positions, self.numbers, cell, np.full(3, self.periodic)))
        forces = outcome.forces if self.rotation is None else rotate_vectors(outcome.forces, self.rotation)
        energy = outcome.energy - (evaluator.isolated_energy(self.numbers) if self.interaction_energy else 0.0)
        return float(energy / KJ_PER_MOL), np.ascontiguousarray(forces * (NM / KJ_PER_MOL))

    def _scratch_of_thread(self) -> _Scratch:
        # Not threading.local: Python forgets that of a thread which is not its own after each call.
        thread = threading.get_ident()
        found = self._scratch.get(thread)
        if found is None:
            from equimd.calculators.evaluator import Evaluator

            with self._lock:
                if self._potential is None:
                    self._potential = self._load()
                found = self._scratch[thread] = _Scratch(Evaluator(self._potential, self.skin))
                if len(self._scratch) > _MAX_THREADS:
                    del self._scratch[next(iter(self._scratch))]
        return found

    def _load(self) -> "Potential":
        """The potential, checked, and symmetrised if that is asked for."""
        from equimd.calculators.evaluator import Evaluator
        from equimd.calculators.loading import fingerprint, resolve, symmetrized
        from equimd.frames.electrons import check_electrons
        from equimd.models.checkpoint import shipped_folder

        model = self.model
        if isinstance(model, str):
            model = shipped_folder(model, quiet=True) or model
        base, _, header = resolve(model, self.device, self.dtype)
        now = fingerprint(base)
        if self.fingerprint not in (None, now):
            raise InputError(
                f"{self.model} is not the potential that this system was made with (fingerprint {now[:12]}, not "
                f"{self.fingerprint[:12]}); bring that one back, or make the system anew"
            )
        self.fingerprint = now
        check_electrons(header, **self.electrons)
        if self.self_check:
            from equimd.models.selfcheck import self_check

            self_check(base).raise_if_failed()
        potential = symmetrized(base, self.symmetrize)
        Evaluator(potential, self.skin).check_numbers(self.numbers)
        return potential

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What 0.1.0 did not store, then what the pickle says without what 0.1.0 kept for itself.
        defaults = {"particles": None, "self_check": True, "electrons": {}, "fingerprint": None}
        self.__dict__ |= defaults | {name: value for name, value in state.items() if not name.startswith("_")}
        self._forget()


def _portable(model: "str | Path | Potential") -> "str | Potential":
    """A shipped potential's name, an absolute path, or the object: what another folder or Context can use."""
    if not isinstance(model, str | Path):
        return model  # copied where it is loaded, and pickled when the PythonForce is made
    from equimd.models.checkpoint import find_potential, shipped_folder

    found = find_potential(model)
    return str(found.resolve()) if shipped_folder(model, quiet=True) is None else str(model)


def _in_angstrom(quantity: Any) -> np.ndarray:
    from openmm import unit

    return NM * np.asarray(quantity.value_in_unit(unit.nanometer))  # type: ignore[attr-defined]
