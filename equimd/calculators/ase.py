"""EquimdCalculator: a potential as an ASE calculator and as a ForceField."""

import copy
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from equimd.calculators.forcefield import Evaluation, process_peak_memory
from equimd.errors import InputError
from equimd.frames.electrons import check_atoms, electron_entries

if TYPE_CHECKING:
    from equimd.calculators.evaluator import Outcome, Structure
    from equimd.models.potential import Potential

P = ParamSpec("P")
T = TypeVar("T")


def _alone(
    method: "Callable[Concatenate[EquimdCalculator, P], T]",
) -> "Callable[Concatenate[EquimdCalculator, P], T]":
    """The method, while no other thread is in one of these."""

    @functools.wraps(method)
    def run(self: "EquimdCalculator", *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return run


class EquimdCalculator(Calculator):
    """Energy, forces and stress of a potential in ASE's conventions, and in batches.

    Energies are Python floats in eV and contain the isolated atoms; ``energies`` sum to the energy. ``stress`` is
    Voigt xx yy zz yz xz xy in eV/Å³, tension positive; the raw 3×3, whose antisymmetric part shows the torque of a
    potential that is not invariant, is kept as ``stress_tensor``. Results are kept until positions, cell, pbc, numbers,
    initial charges or magnetic moments, or a charge or spin in ``info`` (see ``frames/electrons.py``) change. Nothing
    global is touched, and torch's default dtype and device, autocast and inference mode change nothing.

    Threads may share a calculator: each gets the results of its own atoms, one after the other, from what returns them
    (``atoms.get_forces()``); ``results`` and ``stress_tensor`` are those of the last calculation of any thread. A copy
    or pickle has weights of its own and no results. A process that was forked computes on one thread, since OpenMP's do
    not survive a fork; use the start method "spawn" for more of them, and wherever a GPU is used.

    Args:
        potential: A name such as "ethanol-equivariant", a path, or a Potential (of which a copy is made).
        device: "auto" is a GPU where there is one; else "cpu", "cuda", "cuda:1", ….
        dtype: Precision of the network, "float32" or "float64".
        symmetrize: None, "average", "random", "canonical", or the settings of a ``SymmetrizedPotential`` as a mapping.
        skin: Width in Å of the Verlet skin.
        self_check: Check kernels, gradient, neighbours and symmetry once, now; compiles kernels on their first use.

    Raises:
        InputError: here for a potential, device, dtype or option that does not exist; in a calculation for an unknown
            element, positions or periodic cell vectors that are not finite, no atoms, two atoms at one place, a cell so
            small that atoms overlap their own images, a charged or open-shell system.
        SelfCheckError: the potential contradicts itself, for instance forces that are not the gradient of the energy.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self,
        potential: "Potential | str | Path",
        device: str = "auto",
        dtype: str = "float32",
        symmetrize: str | Mapping[str, Any] | None = None,
        skin: float = 0.5,
        self_check: bool = True,
    ) -> None:
        super().__init__()
        from equimd.calculators.loading import resolve

        self._lock = threading.RLock()
        base, self._name, self.header = resolve(potential, device, dtype)
        self._symmetrize, self._skin, self._self_check = symmetrize, skin, self_check
        self._use(base)

    def _use(self, base: "Potential") -> None:
        """Compute with ``base`` from now on, checked and wrapped as asked for."""
        if self._self_check:
            from equimd.models.selfcheck import self_check

            self_check(base).raise_if_failed()
        from equimd.calculators.evaluator import Evaluator
        from equimd.calculators.loading import symmetrized

        self.potential = symmetrized(base, self._symmetrize)
        self.family: str = base.family
        self.stochastic = getattr(self.potential, "mode", None) == "random"
        self.learned_symmetry = base.family != "equivariant"
        self.device = str(base.device)
        self.dtype = str(base.dtype).removeprefix("torch.")
        self._evaluator = Evaluator(self.potential, self._skin)
        self._origin: str | None = None
        self._forget()

    @property
    def _base(self) -> "Potential":
        """The potential without its symmetrisation."""
        if self._symmetrize is None:
            return self.potential
        from equimd.models.symmetrized import SymmetrizedPotential

        assert isinstance(self.potential, SymmetrizedPotential)
        return self.potential.inner

    def __getstate__(self) -> dict[str, Any]:
        """Without results, neighbour list and lock, which are of one calculator alone."""
        scratch = ("_lock", "_evaluator", "atoms", "results", "stress_tensor", "_info", "get_spin_polarized")
        state = {name: value for name, value in self.__dict__.items() if name not in scratch}
        return state | {name: copy.copy(state[name]) for name in ("parameters", "header")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without results."""
        from equimd.calculators.evaluator import Evaluator

        vars(self).update(state)
        self._lock = threading.RLock()
        self.get_spin_polarized = self._deprecated_get_spin_polarized  # as ASE's constructor does
        self._evaluator = Evaluator(self.potential, self._skin)
        self._forget()

    def _get_name(self) -> str:
        return self._name

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """What ASE's writers store of a calculator, so that readers know its results as predictions."""
        stored = {"potential": self.name, "family": self.family, "device": self.device, "dtype": self.dtype}
        return stored | {"predicted_by": self.origin}

    @property
    def origin(self) -> str:
        """Who made the results, as files state it: name, weights and precision; see ``equimd.origin``."""
        if self._origin is None:
            weights, mode = self.fingerprint()["weights"][:16], self._symmetrize
            turned = "" if mode is None else f", symmetrised by {mode if isinstance(mode, str) else mode.get('mode')}"
            self._origin = f"equimd potential {self.name}, weights {weights}, {self.dtype}{turned}"
        return self._origin

    @property
    def level_of_theory(self) -> str | None:
        """The method that labelled the training data, as the recipe states it; None if it does not."""
        data = (self.header.get("recipe") or {}).get("data") or {}
        return self.header.get("reference") or data.get("reference") or None

    def fingerprint(self) -> dict[str, Any]:
        """What decides every prediction to the last bit: SHA-256 of the weights, precision, kernels, symmetrisation."""
        from equimd.calculators.loading import weights_hash

        symmetrize = dict(self._symmetrize) if isinstance(self._symmetrize, Mapping) else self._symmetrize
        return {
            "name": self.name,
            "dtype": self.dtype,
            "symmetrize": symmetrize,
            "weights": weights_hash(self._base),
            "kernels": self._base.kernel_backend,
        }

    # --- ASE ---------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self.atoms = None
        self.results = {}
        self.stress_tensor: np.ndarray | None = None
        self._info: dict[str, Any] = {}

    @_alone
    def reset(self) -> None:
        """Forget results and the neighbour list."""
        self._forget()
        self._evaluator.reset()

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What changed since the last calculation, compared exactly; "info" stands for the keys that are read."""
        old = self.atoms
        if old is None:
            return list(all_changes)
        changes = [
            name
            for name, a, b in (
                ("positions", old.positions, atoms.positions),
                ("numbers", old.numbers, atoms.numbers),
                ("cell", old.cell.array, atoms.cell.array),
                ("pbc", old.pbc, atoms.pbc),
            )
            if not np.array_equal(a, b) and not (name == "cell" and np.array_equal(a, b, equal_nan=True))
        ]
        changes += [
            name
            for name in ("initial_charges", "initial_magmoms")
            if (name in old.arrays) != (name in atoms.arrays)
            or (name in old.arrays and not np.array_equal(old.arrays[name], atoms.arrays[name]))
        ]
        if self._info != _read_info(atoms):
            changes.append("info")
        return changes

    @_alone
    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """One of ``implemented_properties``, computed if need be; arrays are copies."""
        if name not in self.implemented_properties:
            raise PropertyNotImplementedError(f"{name} property not implemented")
        if atoms is None:
            atoms = self.atoms
        elif self.check_state(atoms):
            self._forget()
        if name not in self.results:
            if not allow_calculation:
                return None
            if atoms is None:
                raise InputError("no atoms given yet; pass atoms or set atoms.calc first")
            self.calculate(atoms, [name])
        result = self.results[name]
        return result.copy() if isinstance(result, np.ndarray) else result

    @_alone
    def calculate_properties(self, atoms: Atoms, properties: Sequence[str]) -> Any:
        """As ASE's, whose two steps must not be parted."""
        return super().calculate_properties(atoms, properties)

    @_alone
    def calculation_required(self, atoms: Atoms, properties: Sequence[str]) -> bool:
        """Whether one of the properties is not known for these atoms."""
        return super().calculation_required(atoms, properties)

    @_alone
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Compute energy and forces; stress where it is asked for, or costs next to nothing."""
        atoms = self.atoms if atoms is None else atoms
        if atoms is None:
            raise InputError("no atoms given yet; pass atoms or set atoms.calc first")
        self._forget()
        info = _read_info(atoms)
        check_atoms(atoms, self.header)
        structure = _structure(atoms)
        if "stress" in properties and not structure.has_stress:
            raise PropertyNotImplementedError("stress needs a periodic structure with three lattice vectors")
        # From the gradient that gives the forces, the stress is one small sum; a direct-force model has to do more.
        conservative = not getattr(self.potential, "direct_forces", False)
        stress = "stress" in properties or (conservative and structure.has_stress)
        outcome = self._evaluator.evaluate(structure, stress)
        self.atoms, self._info = atoms.copy(), info
        self._store(outcome)

    def _store(self, outcome: "Outcome") -> None:
        self.results = {
            "energy": outcome.energy,
            "free_energy": outcome.energy,
            "energies": outcome.energies,
            "forces": outcome.forces,
        }
        if outcome.stress is not None:
            self.stress_tensor = outcome.stress
            self.results["stress"] = full_3x3_to_voigt_6_stress(outcome.stress)

    # --- ForceField --------------------------------------------------------------------------------------------------

    def evaluate(self, frames: Sequence[Atoms], max_edges: int | None = None) -> Evaluation:
        """Energies (eV), forces (eV/Å) and stresses (raw 3×3, eV/Å³, None where nothing is periodic) of many frames.

        The frames are evaluated in batches of at most ``max_edges`` directed edges; they are not changed, and the
        cached results of single calculations stay.
        """
        return _evaluation(self._evaluator.evaluate_many([self._checked(f) for f in frames], max_edges))

    def evaluate_rotated(self, frame: Atoms, rotations: np.ndarray, max_edges: int | None = None) -> Evaluation:
        """Predictions for K rotated copies of one frame in the rotated frame; rotations (K, 3, 3), improper or not.

        Positions and cell are rotated in float64; the one neighbour list serves all copies.
        """
        rotations = np.asarray(rotations, dtype=np.float64)
        if rotations.ndim != 3 or rotations.shape[1:] != (3, 3):
            raise InputError(f"rotations have shape {rotations.shape}; (K, 3, 3) is accepted")
        off = np.abs(rotations @ rotations.swapaxes(1, 2) - np.eye(3)).max(initial=0.0)
        if not off <= 1e-6:  # single precision leaves 1e-7; NaN fails
            raise InputError(f"rotations times their transposes are off the identity by {off:.2g}; 1e-6 is accepted")
        return _evaluation(self._evaluator.evaluate_rotated(self._checked(frame), rotations, max_edges))

    def with_dtype(self, dtype: str) -> "EquimdCalculator":
        """The same weights in another precision, as another calculator."""
        from equimd.calculators.loading import torch_dtype
        from equimd.kernels.ambient import building

        other = copy.copy(self)
        with building():
            other._use(copy.deepcopy(self._base).to(torch_dtype(dtype)))
        return other

    def profile(self, atoms: Atoms, repeats: int = 10) -> dict[str, float]:
        """Seconds of each part of one evaluation on one thread, by "direction: layer: part"."""
        return self._evaluator.profile(self._checked(atoms), repeats)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self._base.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._base.device)

    def peak_memory(self) -> float:
        """Peak memory in MiB: of torch's allocator on a GPU, resident memory of the process on a CPU."""
        if self._base.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._base.device) / 2**20
        return process_peak_memory()

    def _checked(self, atoms: Atoms) -> "Structure":
        check_atoms(atoms, self.header)
        return _structure(atoms)


def _structure(atoms: Atoms) -> "Structure":
    from equimd.calculators.evaluator import Structure

    return Structure(atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc)


def _evaluation(outcomes: "list[Outcome]") -> Evaluation:
    return Evaluation(
        np.array([o.energy for o in outcomes]), [o.forces for o in outcomes], [o.stress for o in outcomes]
    )


def _read_info(atoms: Atoms) -> dict[str, Any]:
    """What is read of ``info``, in a form that can be compared and that nobody else changes."""
    return {key: np.asarray(value).tolist() for key, value in electron_entries(atoms).items()}
