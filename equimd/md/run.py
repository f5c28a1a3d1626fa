"""The MD loop: steps, frames at a stride, checkpoints, and a clear end when the dynamics explodes.

A checkpoint holds positions, momenta, cell, the generator of random numbers and the length of the trajectory. The
calculator is reset at every checkpoint, in a run that is never interrupted as well, because the order of a rebuilt
neighbour list changes the last bits of the forces. So a resumed run equals one that was never killed.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames import check_structure
from equimd.frames.transaction import recover
from equimd.md.integrators import Integrator
from equimd.md.output import Output, open_output
from equimd.md.settings import MDSettings
from equimd.neighbors import used_cell
from equimd.origin import mark, origin_of
from equimd.results import Provenance, Result, provenance, write_text_atomically
from equimd.units import KB_EV_PER_K

Progress = Callable[[int, int], None]
Frame = tuple[int, Atoms]


class MDResult(Result):
    """How a run ended. ``stopped`` is null for a run that reached its last step, else the reason in words."""

    calculator: str
    formula: str
    n_atoms: int
    settings: MDSettings
    steps: int
    n_frames: int
    time_ps: float
    mean_temperature_K: float
    stopped: str | None
    trajectory: str
    wall_seconds: float
    provenance: Provenance


class _Explosion(Exception):
    """The dynamics left what a molecule can do; the message says how."""


def run_md(
    atoms: Atoms,
    calculator: Any,
    settings: MDSettings,
    output: str | Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> MDResult:
    """Run MD and write the trajectory to ``output`` (.h5, .h5md, .xyz or .extxyz); ``atoms`` is left as it was.

    Frames carry positions (Å), velocities, forces (eV/Å), energies (eV), cell, and stress where there is a cell. With
    ``resume`` the run that wrote ``output`` goes on from its last checkpoint, up to ``settings.steps``, and every
    number equals that of a run that was never interrupted. A run that explodes ends with ``stopped`` saying why and a
    trajectory that is whole up to there.

    Raises:
        InputError: a structure that the calculator cannot describe, an output that exists (without ``resume``), other
            settings or another calculator than the interrupted run's. A run that was killed before its first checkpoint
            is resumed from its start.
    """
    begin = time.monotonic()
    path = Path(output)
    state_path = path.with_name(path.name + ".state.json")
    atoms = _prepared(atoms, calculator)
    state = _read_state(state_path, settings, atoms) if resume and (path.exists() or state_path.exists()) else None
    if state is not None and state["mark"] == 0:  # killed before the first frames were flushed
        state = None
        recover(path)  # so that no journal of the first flush is left to be replayed
        path.unlink(missing_ok=True)
    sink = open_output(path, append=state is not None)
    if state is not None:
        sink.truncate(state["mark"])
        _apply(atoms, state)
    run = _Run(atoms, settings, state)

    def checkpoint() -> None:
        write_text_atomically(state_path, json.dumps(run.state(sink.flush())))

    try:
        stopped = _advance(run, sink, checkpoint, progress)
    except BaseException:  # an interrupt, or a calculator that failed: keep what there is
        with contextlib.suppress(OSError):
            sink.flush()
        raise
    # The last checkpoint stays where it is: to go on from here exactly as a longer run would have, start from there.
    sink.flush()
    return MDResult(
        calculator=_name(calculator),
        formula=atoms.get_chemical_formula(),
        n_atoms=len(atoms),
        settings=settings,
        steps=run.step,
        n_frames=run.n_frames,
        time_ps=run.step * settings.timestep_fs / 1000.0,
        mean_temperature_K=run.temperature_sum / max(run.n_frames, 1),
        stopped=stopped,
        trajectory=str(path),
        wall_seconds=time.monotonic() - begin,
        provenance=provenance(),
    )


def iterate_md(atoms: Atoms, calculator: Any, settings: MDSettings) -> Iterator[Frame]:
    """The same run without files: (step, frame) at every stride, each frame a copy that carries its results.

    Raises:
        InputError: as ``run_md``.
        RuntimeError: when the dynamics explodes.
    """
    run = _Run(_prepared(atoms, calculator), settings, None)
    yield run.step, run.frame()
    while run.step < settings.steps:
        try:
            run.advance()
        except _Explosion as explosion:
            raise RuntimeError(str(explosion)) from explosion
        if run.step % settings.stride == 0:
            yield run.step, run.frame()
        if run.step % settings.checkpoint_every == 0:
            run.rebuild()


def thermal_momenta(atoms: Atoms, temperature_K: float, rng: np.random.Generator) -> np.ndarray:
    """Momenta (N, 3) in ASE's unit, drawn from the Maxwell-Boltzmann distribution in the frame of the centre of mass.

    A free system holds (3N − 3) kT/2 then; with constraints the centre of mass is left as drawn.
    """
    masses = atoms.get_masses()[:, None]
    momenta = rng.standard_normal((len(atoms), 3)) * np.sqrt(masses * KB_EV_PER_K * temperature_K)
    if not atoms.constraints:
        momenta -= masses * (momenta.sum(axis=0) / masses.sum())
    return momenta


class _Run:
    """The state of a run, and one step of it."""

    def __init__(self, atoms: Atoms, settings: MDSettings, state: dict[str, Any] | None) -> None:
        self.atoms, self.settings = atoms, settings
        self.step, self.n_frames, self.temperature_sum = 0, 0, 0.0
        rng = np.random.default_rng(settings.seed)
        if state is None and not atoms.get_momenta().any():
            atoms.set_momenta(thermal_momenta(atoms, settings.temperature_K, rng))
        self.integrator = Integrator(atoms, settings, rng)
        self.fingerprint = _fingerprint(atoms.calc)
        self.origin = origin_of(atoms.calc)
        if state is not None:
            self.step, self.n_frames = state["step"], state["n_frames"]
            self.temperature_sum = state["temperature_sum"]
            self.integrator.restore(state["integrator"])
            if state["n_calls"] is not None:  # a potential that turns at random goes on where it was
                _potential(atoms.calc).n_calls = state["n_calls"]

    def advance(self) -> None:
        """One step, and a look at what it did."""
        try:
            self.integrator.step()
            forces = self.atoms.get_forces()
        except InputError as error:  # the calculator refuses positions that the dynamics has led to
            raise _Explosion(f"step {self.step + 1}: {error}") from error
        self.step += 1
        largest = float(np.abs(forces).max())
        if not largest <= self.settings.max_force:
            raise _Explosion(f"step {self.step}: a force is {largest:.4g} eV/Å, more than {self.settings.max_force:g}")
        temperature = self.temperature()
        if not temperature <= self.settings.max_temperature_K:
            limit = self.settings.max_temperature_K
            raise _Explosion(f"step {self.step}: the temperature is {temperature:.4g} K, more than {limit:g}")

    def temperature(self) -> float:
        """Temperature (K); the resting centre of mass of NVE takes three degrees of freedom."""
        lost = sum(constraint.get_removed_dof(self.atoms) for constraint in self.atoms.constraints)
        lost += 3 if self.settings.ensemble == "nve" and not lost else 0
        return 2.0 * float(self.atoms.get_kinetic_energy()) / (max(3 * len(self.atoms) - lost, 1) * KB_EV_PER_K)

    def rebuild(self) -> None:
        """Have the calculator forget results and neighbour list."""
        calculator: Any = self.atoms.calc
        calculator.reset()
        self.integrator.refresh()

    def frame(self) -> Atoms:
        """A copy of the atoms that carries its results."""
        atoms = self.atoms
        results: dict[str, Any] = {
            "energy": float(atoms.get_potential_energy()),
            "forces": atoms.get_forces(apply_constraint=False),
        }
        if atoms.pbc.all() and "stress" in getattr(atoms.calc, "implemented_properties", ()):
            results["stress"] = atoms.get_stress(apply_constraint=False)
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, **results)
        mark(copy, self.origin)
        self.n_frames += 1
        self.temperature_sum += self.temperature()
        return copy

    def state(self, mark: int) -> dict[str, Any]:
        """The checkpoint as JSON's types; floats keep every bit."""
        atoms = self.atoms
        return {
            "step": self.step,
            "n_frames": self.n_frames,
            "temperature_sum": self.temperature_sum,
            "mark": mark,
            "settings": self.settings.model_dump(),
            "calculator": self.fingerprint,
            "n_calls": getattr(_potential(atoms.calc), "n_calls", None),
            "numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "momenta": atoms.get_momenta().tolist(),
            "cell": atoms.cell.array.tolist(),
            "integrator": self.integrator.state(),
        }


def _advance(run: _Run, sink: Output, checkpoint: Callable[[], None], progress: Progress | None) -> str | None:
    """Go to the last step; why the run stopped before, or None."""
    settings = run.settings
    if run.step == 0 and run.n_frames == 0:
        checkpoint()
        sink.append(run.frame(), 0, 0.0, run.temperature())
    while run.step < settings.steps:
        try:
            run.advance()
        except _Explosion as explosion:
            return str(explosion)
        if run.step % settings.stride == 0:
            sink.append(run.frame(), run.step, run.step * settings.timestep_fs, run.temperature())
        if run.step % settings.checkpoint_every == 0:
            checkpoint()
            run.rebuild()
        if progress is not None and (run.step % 20 == 0 or run.step == settings.steps):
            progress(run.step, settings.steps)
    return None


def _prepared(atoms: Atoms, calculator: Any) -> Atoms:
    """A copy of the structure with the calculator, checked."""
    check_structure(atoms, getattr(_potential(calculator), "species", None))
    atoms = atoms.copy()
    atoms.info.pop("lossy", None)  # what a format rounded is where the run starts, and no longer rounded
    atoms.set_cell(used_cell(atoms.cell.array, atoms.pbc))  # NaN in a vector that is ignored would not equal itself
    calculator.reset()
    atoms.calc = calculator
    return atoms


def _read_state(path: Path, settings: MDSettings, atoms: Atoms) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot resume: {path} cannot be read ({error.strerror}); start without resume") from error
    except ValueError as error:
        raise InputError(f"cannot resume: {path} is no checkpoint of a run") from error
    if state["numbers"] != atoms.numbers.tolist():
        raise InputError(f"cannot resume: {path} holds other atoms than the structure given")
    before, now = state["calculator"], _fingerprint(atoms.calc)
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            raise InputError(f"cannot resume: the calculator's {key} was {before.get(key)!r} and is {now.get(key)!r}")
    old, new = state["settings"], settings.model_dump()
    for key in new:
        if key != "steps" and old.get(key) != new[key]:
            raise InputError(f"cannot resume: {key} was {old.get(key)!r} and is {new[key]!r}; only steps may change")
    return state


def _potential(calculator: Any) -> Any:
    return getattr(calculator, "potential", None)


def _fingerprint(calculator: Any) -> dict[str, Any]:
    """What must not change at a resume; in JSON's types."""
    own = getattr(calculator, "fingerprint", None)
    return {"name": _name(calculator)} if own is None else json.loads(json.dumps(own()))


def _name(calculator: Any) -> str:
    return str(getattr(calculator, "name", None) or type(calculator).__name__)


def _apply(atoms: Atoms, state: dict[str, Any]) -> None:
    atoms.set_cell(state["cell"])
    atoms.positions = np.array(state["positions"])
    atoms.set_momenta(np.array(state["momenta"]))
