"""How fast a force field is: one evaluation and one full MD step, through ASE's interface, as a simulation runs it."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet
from pydantic import Field

from equimd.analysis.inputs import Progress, checked_frames
from equimd.calculators.forcefield import ForceField, as_force_field, process_peak_memory, synchronize
from equimd.errors import InputError
from equimd.results import Block, Number, Provenance, Result, provenance

# A spread beyond this fraction of the median means that the machine was busy with something else.
UNSTABLE_SPREAD = 0.20
# Neither loop may run for ever on a clock that stands still.
_MOST_STEPS = 10_000


class TimingSettings(Block):
    """How long to measure; the defaults are for numbers that are published, tests shorten them."""

    warmup_steps: int = Field(default=20, ge=1)
    warmup_seconds: float = Field(default=1.0, ge=0)
    n_blocks: int = Field(default=5, ge=5)
    block_seconds: float = Field(default=0.5, ge=0)
    temperature_K: float = Field(default=300.0, gt=0)
    seed: int = 0


class Timing(Block):
    """Median over blocks in ms, and spread = (slowest − fastest block) / median, as a fraction."""

    median: float
    spread: float


class ThroughputResult(Result):
    """Speed of a force field on one structure.

    ms_per_forward: one evaluation of energy and forces; ms_per_step: one velocity Verlet step, neighbour list included.
    unstable: one of the spreads exceeds 20 %. A device-hour is one hour of ``n_devices`` = 1 device (a CPU counts as
    one). peak_memory_mib: of the device, or of this process on a CPU. profile_ms: parts of an evaluation on one thread,
    if they were asked for.
    """

    name: str
    n_atoms: int
    device: str
    dtype: str
    timestep_fs: float
    unstable: bool
    ms_per_step: Timing
    ms_per_forward: Timing
    steps_per_s: float
    ns_per_day: float
    us_per_atom_step: float
    atom_steps_per_device_hour: float
    ns_per_device_hour: float
    peak_memory_mib: Number
    n_devices: int
    n_evaluations: int
    profile_ms: dict[str, float] | None = None
    settings: TimingSettings
    provenance: Provenance


def measure_throughput(
    calculator: Any,
    atoms: Atoms,
    timestep_fs: float = 0.5,
    *,
    settings: TimingSettings | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
    profile: bool = False,
) -> ThroughputResult:
    """Time evaluations and MD steps of ``calculator`` (any ASE calculator or ForceField) on ``atoms``.

    Warms up by MD steps, then times blocks of evaluations (each at new positions) and of velocity Verlet steps in turn,
    with the device synchronised around every block.

    Args:
        calculator: What is measured.
        atoms: The structure; it is not changed.
        timestep_fs: Time step of the dynamics in fs.
        settings: Length of warm-up and blocks.
        clock: Seconds from any origin; replaced in tests.
        progress: Called with (blocks done, blocks in all).
        profile: Measure the parts of an evaluation, too, where the force field can tell.

    Raises:
        InputError: a broken structure, a time step that is not positive, or a force field without a profile.
    """
    (frame,) = checked_frames(atoms)
    if not timestep_fs > 0:
        raise InputError(f"timestep_fs is {timestep_fs}; expected a positive number")
    settings = settings or TimingSettings()
    bench = _Bench(calculator, frame, timestep_fs, settings, clock)
    if profile and not hasattr(bench.field, "profile"):
        raise InputError(f"{bench.field.name} does not tell where its time goes; accepted are equimd's potentials")
    step_time = bench.warm_up()
    per_block = min(_MOST_STEPS, max(1, math.ceil(settings.block_seconds / step_time))) if step_time > 0 else 1
    forward, step = [], []
    for block in range(settings.n_blocks):
        forward.append(bench.time_forward(per_block))
        step.append(bench.time_md(per_block))
        if progress is not None:
            progress(block + 1, settings.n_blocks)
    result = _result(bench, frame, timestep_fs, settings, _timing(forward), _timing(step))
    if not profile:
        return result
    seconds = bench.field.profile(frame)  # pyright: ignore[reportAttributeAccessIssue]
    return result.model_copy(update={"profile_ms": {part: 1e3 * value for part, value in seconds.items()}})


def _result(
    bench: "_Bench", frame: Atoms, timestep_fs: float, settings: TimingSettings, forward: Timing, step: Timing
) -> ThroughputResult:
    field, ms, n = bench.field, step.median, len(frame)
    peak_memory = getattr(field, "peak_memory", process_peak_memory)
    return ThroughputResult(
        name=field.name,
        n_atoms=n,
        device=field.device,
        dtype=field.dtype,
        timestep_fs=timestep_fs,
        unstable=max(step.spread, forward.spread) > UNSTABLE_SPREAD,
        ms_per_step=step,
        ms_per_forward=forward,
        steps_per_s=1e3 / ms,
        ns_per_day=timestep_fs * 1e-6 * 86_400e3 / ms,
        us_per_atom_step=1e3 * ms / n,
        atom_steps_per_device_hour=n * 3_600e3 / ms,
        ns_per_device_hour=timestep_fs * 1e-6 * 3_600e3 / ms,
        peak_memory_mib=float(peak_memory()),
        n_devices=1,
        n_evaluations=bench.n_evaluations,
        settings=settings,
        provenance=provenance(),
    )


def _timing(ms: list[float]) -> Timing:
    median = float(np.median(ms))
    if not median > 0:
        raise InputError("the clock stood still during a block; expected one that advances")
    return Timing(median=median, spread=(max(ms) - min(ms)) / median)


class _Bench:
    """The structure, the dynamics and the clock of one measurement."""

    def __init__(
        self, calculator: Any, frame: Atoms, timestep_fs: float, settings: TimingSettings, clock: Callable[[], float]
    ) -> None:
        self.field = as_force_field(calculator)
        self.settings, self.clock, self.timestep_fs = settings, clock, timestep_fs
        self.n_evaluations = 0
        inner = getattr(self.field, "calculator", calculator)
        self.calculator = inner if callable(getattr(inner, "get_forces", None)) else _FieldCalculator(self.field)
        self.start = frame.copy()
        self.start.set_constraint()
        rng = np.random.default_rng(settings.seed)
        # By hand: ASE's function for it has changed its name.
        width = np.sqrt(self.start.get_masses() * units.kB * settings.temperature_K)
        self.start.set_momenta(width[:, None] * rng.normal(size=(len(frame), 3)))
        # Small enough to stay within a Verlet skin, large enough that no cache answers.
        self.displacements = rng.normal(scale=0.005, size=(16, len(frame), 3))

    def warm_up(self) -> float:
        """Run MD for the longer of the two lengths; return the seconds of a step at its end."""
        begin, steps, ms = self._now(), 0, float("nan")
        while steps < _MOST_STEPS:
            ms = self.time_md(5)
            steps += 5
            if steps >= self.settings.warmup_steps and self._now() - begin >= self.settings.warmup_seconds:
                break
        return ms / 1e3

    def time_forward(self, count: int) -> float:
        """Milliseconds of one evaluation of energy and forces, over ``count`` new sets of positions."""
        atoms = self.start.copy()
        begin = self._now()
        for k in range(count):
            atoms.positions = self.start.positions + self.displacements[(self.n_evaluations + k) % 16]
            self.calculator.get_forces(atoms)
        self.n_evaluations += count
        return 1e3 * (self._now() - begin) / count

    def time_md(self, count: int) -> float:
        """Milliseconds of one velocity Verlet step, over ``count`` steps from the start."""
        atoms = self.start.copy()
        atoms.calc = self.calculator
        atoms.get_forces()  # known before the first step, as in a long run
        dynamics = VelocityVerlet(atoms, timestep=self.timestep_fs * units.fs)
        begin = self._now()
        dynamics.run(count)
        self.n_evaluations += count + 1
        return 1e3 * (self._now() - begin) / count

    def _now(self) -> float:
        synchronize(self.field)
        return self.clock()


class _FieldCalculator(Calculator):
    """A ForceField that is no ASE calculator, for ASE's integrator."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, field: ForceField) -> None:
        super().__init__()
        self.field = field

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Energy (eV) and forces (N, 3) in eV/Å of one frame."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        evaluation = self.field.evaluate([self.atoms])
        self.results = {"energy": float(evaluation.energies[0]), "forces": evaluation.forces[0]}
