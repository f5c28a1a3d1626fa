"""One run's atoms in motion: its start, its steps, what is kept of them, and when they are no longer a molecule."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.md.averages import Average
from equimd.md.checkpoint import State
from equimd.md.constraints import removed_degrees_of_freedom
from equimd.md.integrators import Integrator
from equimd.md.settings import MDSettings
from equimd.origin import mark, origin_of
from equimd.units import AMU_PER_A3, BAR, KB_EV_PER_K


class UnstableStart(InputError):
    """The forces on the start structure are beyond what MD can begin with."""


class CalculatorError(RuntimeError):
    """The calculator failed during a run; ``__cause__`` is what it raised."""

    def __init__(self, step: int, error: Exception) -> None:
        super().__init__(f"step {step}: {type(error).__name__}: {error or 'no message'}")
        self.step = step


class Explosion(Exception):
    """The dynamics left what a molecule can do; the message says how."""


def thermal_momenta(atoms: Atoms, temperature_K: float, rng: np.random.Generator) -> np.ndarray:
    """Momenta (N, 3) in ASE's unit, drawn from the Maxwell-Boltzmann distribution in the frame of the centre of mass.

    A free system holds (3N − 3) kT/2 then; with constraints the centre of mass is left as drawn.
    """
    masses = atoms.get_masses()[:, None]
    momenta = rng.standard_normal((len(atoms), 3)) * np.sqrt(masses * KB_EV_PER_K * temperature_K)
    if not atoms.constraints:
        momenta -= masses * (momenta.sum(axis=0) / masses.sum())
    return momenta


class Run:
    """The state of a run, and one step of it."""

    def __init__(self, atoms: Atoms, settings: MDSettings, state: State | None) -> None:
        self.atoms, self.settings = atoms, settings
        self.step, self.n_frames, self.temperature_sum = 0, 0, 0.0
        self.averages: dict[str, Average] | None = {}
        self.masses = atoms.get_masses()
        self.removed = removed_degrees_of_freedom(atoms)
        if state is not None:
            _apply(atoms, state)
        rng = np.random.default_rng(settings.seed)
        if state is None and not atoms.get_momenta().any():
            atoms.set_momenta(thermal_momenta(atoms, settings.temperature_K, rng))
        elif state is None and atoms.constraints:
            atoms.set_momenta(atoms.get_momenta())  # what a fixed atom brings is no motion
        with self._evaluating(self.step):
            self.integrator = Integrator(atoms, settings, rng)
        self.fingerprint = fingerprint_of(atoms.calc)
        self.origin = origin_of(atoms.calc)
        if state is not None:
            self.step, self.n_frames = state["step"], state["n_frames"]
            self.temperature_sum = state["temperature_sum"]
            # An earlier version kept none: means of the rest alone would be taken for means of the whole.
            stored = state.get("averages")
            self.averages = None if stored is None else {name: Average(levels) for name, levels in stored.items()}
            self.integrator.restore(state["integrator"])
            if state["n_calls"] is not None:  # a potential that turns at random goes on where it was
                potential_of(atoms.calc).n_calls = state["n_calls"]

    def check_start(self) -> None:
        """Refuse a structure whose first forces no dynamics survives.

        Raises:
            UnstableStart: a force is not finite or exceeds ``max_force``.
        """
        with self._evaluating(self.step):
            forces = np.abs(self.atoms.get_forces())
        if not forces.max() <= self.settings.max_force:
            atom = int(np.unravel_index(forces.argmax(), forces.shape)[0])  # NaN counts as the largest
            raise UnstableStart(
                f"the force on atom {atom} ({self.atoms.symbols[atom]}) of the start structure is"
                f" {forces.max():.4g} eV/Å; accepted: at most {self.settings.max_force:g}, so relax the structure first"
            )

    def advance(self) -> None:
        """One step, and a look at what it did."""
        try:
            with self._evaluating(self.step + 1):
                self.integrator.step()
                forces = self.atoms.get_forces()
        except InputError as error:  # the calculator refuses positions that the dynamics has led to
            raise Explosion(f"step {self.step + 1}: {error}") from error
        self.step += 1
        largest = float(np.abs(forces).max())
        if not largest <= self.settings.max_force:
            raise Explosion(f"step {self.step}: a force is {largest:.4g} eV/Å, more than {self.settings.max_force:g}")
        temperature = self.temperature()
        if not temperature <= self.settings.max_temperature_K:
            limit = self.settings.max_temperature_K
            raise Explosion(f"step {self.step}: the temperature is {temperature:.4g} K, more than {limit:g}")

    @contextlib.contextmanager
    def _evaluating(self, step: int) -> Iterator[None]:
        """Say at which step a calculator failed; what it refuses stays an InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise CalculatorError(step, error) from error

    def kinetic_energy(self) -> float:
        """Of all motion, eV."""
        return 0.5 * float((self.atoms.arrays["momenta"] ** 2).sum(axis=1) @ (1.0 / self.masses))

    def temperature(self) -> float:
        """Temperature (K) of what moves freely; NVE without constraints leaves out the centre of mass, which nothing
        heats or cools."""
        kinetic, lost = self.kinetic_energy(), self.removed
        if self.settings.ensemble == "nve" and not lost:
            total = self.atoms.arrays["momenta"].sum(axis=0)
            kinetic, lost = kinetic - 0.5 * float(total @ total) / self.masses.sum(), 3
        return 2.0 * kinetic / (max(3 * len(self.atoms) - lost, 1) * KB_EV_PER_K)

    def rebuild(self) -> None:
        """Have the calculator forget results and neighbour list."""
        calculator: Any = self.atoms.calc
        calculator.reset()
        with self._evaluating(self.step):
            self.integrator.refresh()

    def frame(self) -> Atoms:
        """A copy of the atoms that carries its results."""
        atoms = self.atoms
        results: dict[str, Any] = {}
        with self._evaluating(self.step):
            results["energy"] = float(atoms.get_potential_energy(apply_constraint=False))
            results["forces"] = atoms.get_forces(apply_constraint=False)
            if atoms.pbc.all() and "stress" in getattr(atoms.calc, "implemented_properties", ()):
                results["stress"] = atoms.get_stress(apply_constraint=False)
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, **results)
        mark(copy, self.origin)
        self.n_frames += 1
        self.temperature_sum += self.temperature()
        self._average(results.get("stress"))
        return copy

    def _average(self, stress: np.ndarray | None) -> None:
        """Add the present frame to the means."""
        if self.averages is None:
            return
        values = {"temperature_K": self.temperature()}
        if self.atoms.pbc.all():
            volume = self.atoms.cell.volume
            values |= {"volume_A3": volume, "density_g_cm3": self.masses.sum() / volume * AMU_PER_A3}
            if stress is not None:
                virial = -float(np.sum(stress[:3])) / 3.0
                values["pressure_bar"] = (virial + 2.0 * self.kinetic_energy() / (3.0 * volume)) / BAR
        for name, value in values.items():
            self.averages.setdefault(name, Average()).add(float(value))

    def reached(self, stopped: str | None) -> dict[str, Any]:
        """How far the run has come, in JSON's types."""
        averages = {name: average.levels for name, average in (self.averages or {}).items()}
        return {
            "step": self.step,
            "n_frames": self.n_frames,
            "temperature_sum": self.temperature_sum,
            "averages": averages,
            "stopped": stopped,
        }

    def state(self, mark: int) -> State:
        """The checkpoint as JSON's types; floats keep every bit."""
        atoms = self.atoms
        averages = None if self.averages is None else self.reached(None)["averages"]
        return {
            "step": self.step,
            "n_frames": self.n_frames,
            "temperature_sum": self.temperature_sum,
            "averages": json.loads(json.dumps(averages)),  # a copy: the run goes on
            "mark": mark,
            "settings": self.settings.model_dump(),
            "calculator": self.fingerprint,
            "n_calls": getattr(potential_of(atoms.calc), "n_calls", None),
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "momenta": atoms.get_momenta().tolist(),
            "cell": atoms.cell.array.tolist(),
            "integrator": self.integrator.state(),
        }


def potential_of(calculator: Any) -> Any:
    """The potential inside a calculator of ours; None for another's."""
    return getattr(calculator, "potential", None)


def fingerprint_of(calculator: Any) -> dict[str, Any]:
    """What must not change at a resume; in JSON's types."""
    own = getattr(calculator, "fingerprint", None)
    return {"name": name_of(calculator)} if own is None else json.loads(json.dumps(own()))


def name_of(calculator: Any) -> str:
    """What a calculator calls itself."""
    return str(getattr(calculator, "name", None) or type(calculator).__name__)


def _apply(atoms: Atoms, state: dict[str, Any]) -> None:
    atoms.set_cell(state["cell"])
    atoms.positions = np.array(state["positions"])
    atoms.set_momenta(np.array(state["momenta"]), apply_constraint=False)
