"""The MD loop: steps, frames at a stride, checkpoints, and a clear end when the dynamics explodes.

A checkpoint holds positions, momenta, cell, the generator of random numbers and the length of the trajectory. The
calculator is reset at every checkpoint, in a run that is never interrupted as well, because the order of a rebuilt
neighbour list changes the last bits of the forces. So a resumed run equals one that was never killed.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd.errors import InputError
from equimd.frames import check_structure
from equimd.frames.transaction import recover
from equimd.md.averages import Average, Mean
from equimd.md.checkpoint import State, describe, read_state, state_path, write_state
from equimd.md.constraints import check_constraints
from equimd.md.dynamics import Explosion, Run, fingerprint_of, name_of, potential_of
from equimd.md.output import Output, alone, open_output
from equimd.md.settings import MDSettings
from equimd.neighbors import used_cell
from equimd.results import Provenance, Result, provenance

Progress = Callable[[int, int], None]
Frame = tuple[int, Atoms]
# Shorter steps are taken for a slip of units: even a proton on a stiff bond needs no less than 0.1 fs.
_SHORTEST_STEP_FS = 0.01


class MDResult(Result):
    """How a run ended. ``stopped`` is null for a run that reached its last step, else the reason in words.

    temperature (K), volume (Å³), density (g/cm³), pressure (bar, the kinetic part included): means over the stored
    frames. The last three are null without three periodic directions, pressure also without a stress.
    """

    calculator: str
    formula: str
    n_atoms: int
    settings: MDSettings
    steps: int
    n_frames: int
    time_ps: float
    mean_temperature_K: float
    temperature_K: Mean | None = None
    volume_A3: Mean | None = None
    density_g_cm3: Mean | None = None
    pressure_bar: Mean | None = None
    stopped: str | None
    trajectory: str
    wall_seconds: float
    provenance: Provenance


def run_md(
    atoms: Atoms,
    calculator: Any,
    settings: MDSettings,
    output: str | Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> MDResult:
    """Run MD and write the trajectory to ``output`` (.h5, .h5md, .xyz or .extxyz); ``atoms`` is left as it was.

    Frames carry positions (Å), velocities, forces (eV/Å), energies (eV), cell, and stress where there is a cell.
    Constraints hold, and energies and forces are the calculator's, without what constraints add. With ``resume`` the
    run that wrote ``output`` goes on from its last checkpoint, up to ``settings.steps``, and every number equals that
    of a run that was never interrupted; a run that has ended is left as it is. A run that explodes ends with
    ``stopped`` saying why and a trajectory that is whole up to there.

    Raises:
        InputError: a structure that the calculator cannot describe, constraints that cannot be kept, an output that
            exists (without ``resume``) or that another run writes, fewer steps than are done, or another start
            structure, other settings or another calculator than the interrupted run's. A run that was killed before
            its first checkpoint is resumed from its start.
        UnstableStart: an InputError; the first forces are not finite or exceed ``settings.max_force``.
        CalculatorError: the calculator raises; the trajectory is whole up to there.
    """
    path = Path(output)
    atoms = _prepared(atoms, calculator, settings)
    with alone(path):
        return _run(atoms, settings, path, resume, progress)


def _run(atoms: Atoms, settings: MDSettings, path: Path, resume: bool, progress: Progress | None) -> MDResult:
    begin = time.monotonic()
    start = describe(atoms)
    state = None
    if resume and (path.exists() or state_path(path).exists()):
        recover(path)
        state = read_state(path, settings, atoms, fingerprint_of(atoms.calc))
        reached = state.get("reached")
        if reached and path.exists() and (reached["stopped"] or reached["step"] == settings.steps):
            return _result(atoms, settings, path, reached, begin)
    if state is not None and state["mark"] == 0:  # killed before the first frames were flushed
        state = None
        path.unlink(missing_ok=True)
    run = Run(atoms, settings, state)
    if state is None:
        run.check_start()
    sink = open_output(path, append=state is not None)
    if state is not None:
        sink.truncate(state["mark"])
    _doubt(settings)
    kept: State = {"start": start, **(state or {})}

    def checkpoint() -> None:
        mark = sink.flush()
        kept.update(run.state(mark))
        kept.pop("reached", None)
        write_state(path, kept)

    def ended(stopped: str | None) -> dict[str, Any]:
        """Note how far the frames reach. The checkpoint stays: from there a resumed run goes on as a longer one."""
        sink.flush()
        kept["reached"] = run.reached(stopped)
        write_state(path, kept)
        return kept["reached"]

    try:
        stopped = _advance(run, sink, checkpoint, progress)
    except BaseException:  # an interrupt, or a calculator that failed: keep what there is
        with contextlib.suppress(OSError):
            if "mark" in kept:
                ended(None)
        raise
    return _result(atoms, settings, path, ended(stopped), begin)


def _result(atoms: Atoms, settings: MDSettings, path: Path, reached: dict[str, Any], begin: float) -> MDResult:
    means: dict[str, Any] = {name: Average(levels).mean() for name, levels in reached["averages"].items()}
    return MDResult(
        calculator=name_of(atoms.calc),
        formula=atoms.get_chemical_formula(),
        n_atoms=len(atoms),
        settings=settings,
        steps=reached["step"],
        n_frames=reached["n_frames"],
        time_ps=reached["step"] * settings.timestep_fs / 1000.0,
        mean_temperature_K=reached["temperature_sum"] / max(reached["n_frames"], 1),
        stopped=reached["stopped"],
        trajectory=str(path),
        wall_seconds=time.monotonic() - begin,
        provenance=provenance(),
        **means,
    )


def iterate_md(atoms: Atoms, calculator: Any, settings: MDSettings) -> Iterator[Frame]:
    """The same run without files: (step, frame) at every stride, each frame a copy that carries its results.

    Raises:
        InputError: as ``run_md``.
        RuntimeError: when the dynamics explodes, or the calculator fails.
    """
    run = Run(_prepared(atoms, calculator, settings), settings, None)
    run.check_start()
    yield run.step, run.frame()
    while run.step < settings.steps:
        try:
            run.advance()
        except Explosion as explosion:
            raise RuntimeError(str(explosion)) from explosion
        if run.step % settings.stride == 0:
            yield run.step, run.frame()
        if run.step % settings.checkpoint_every == 0:
            run.rebuild()


def _advance(run: Run, sink: Output, checkpoint: Callable[[], None], progress: Progress | None) -> str | None:
    """Go to the last step; why the run stopped before, or None."""
    settings = run.settings
    if run.step == 0 and run.n_frames == 0:
        checkpoint()
        sink.append(run.frame(), 0, 0.0, run.temperature())
    while run.step < settings.steps:
        try:
            run.advance()
        except Explosion as explosion:
            return str(explosion)
        if run.step % settings.stride == 0:
            sink.append(run.frame(), run.step, run.step * settings.timestep_fs, run.temperature())
        if run.step % settings.checkpoint_every == 0:
            checkpoint()
            run.rebuild()
        if progress is not None and (run.step % 20 == 0 or run.step == settings.steps):
            progress(run.step, settings.steps)
    return None


def _doubt(settings: MDSettings) -> None:
    """A word if the settings look like a slip."""
    if settings.timestep_fs < _SHORTEST_STEP_FS:
        warnings.warn(f"the time step is {settings.timestep_fs:g} fs: was it meant in ps?", UserWarning, stacklevel=4)
    if 0 < settings.steps < settings.stride:
        message = f"the stride is {settings.stride} and the run has {settings.steps} steps: only its start is stored"
        warnings.warn(message, UserWarning, stacklevel=4)


def _check_motion(atoms: Atoms) -> None:
    """Refuse masses and momenta with which nothing can move."""
    masses, momenta = atoms.get_masses(), atoms.get_momenta()
    wrong = np.flatnonzero(~(np.isfinite(masses) & (masses > 0)))
    if wrong.size:
        raise InputError(f"the mass of atom {wrong[0]} is {masses[wrong[0]]:g} u; accepted: finite and more than 0")
    wrong = np.flatnonzero(~np.isfinite(momenta).all(axis=1))
    if wrong.size:
        raise InputError(f"the momentum of atom {wrong[0]} is {momenta[wrong[0]].tolist()}; accepted: finite numbers")


def _prepared(atoms: Atoms, calculator: Any, settings: MDSettings) -> Atoms:
    """A copy of the structure with the calculator, checked."""
    check_structure(atoms, getattr(potential_of(calculator), "species", None))
    _check_motion(atoms)
    check_constraints(atoms, settings.ensemble)
    atoms = atoms.copy()
    atoms.info.pop("lossy", None)  # what a format rounded is where the run starts, and no longer rounded
    atoms.set_cell(used_cell(atoms.cell.array, atoms.pbc))  # NaN in a vector that is ignored would not equal itself
    calculator.reset()
    atoms.calc = calculator
    return atoms
