"""The main job: potentials run side by side on one structure, their frames labelled, their errors and costs measured.

Every potential runs its own Langevin trajectory from the same positions and velocities. Frames of all runs are labelled
once with the reference and pooled: accuracy is measured on that common set, so that no potential is judged on easier
structures than another. The equivariance error and its share of the loss belong to the potential's own trajectory,
which is where a simulation meets it.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from equimd.analysis.accuracy import AccuracyResult, evaluate_accuracy
from equimd.analysis.conservation import DriftResult, nve_drift
from equimd.analysis.equivariance import Extras, equivariance_error
from equimd.analysis.equivariance_results import EquivarianceResult
from equimd.analysis.throughput import ThroughputResult, TimingSettings, measure_throughput
from equimd.calculators.forcefield import as_force_field
from equimd.errors import InputError
from equimd.frames import check_structure, read_frames, read_list, write_frames
from equimd.md import run_md
from equimd.md.settings import make_settings
from equimd.references import METHODS, check_level, label, level_mismatch
from equimd.report import RESULTS_FILE, CompareResult, write_report
from equimd.report.comparison import CompareSettings, EnergySeries, Parity, PotentialResult, Trajectory
from equimd.report.verdict import in_words, judge
from equimd.results import provenance

DEFAULT_PAIR = ("ethanol-equivariant", "ethanol-transformer")
# Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

_NVE_SAMPLES = 500
_PARITY_POINTS = 1500
# Starting worker processes takes seconds, as long as labelling this many atoms.
_ATOMS_WORTH_WORKERS = 2000


class SimulationError(RuntimeError):
    """A potential's dynamics did not survive."""


@dataclass
class Contestant:
    """One potential while it is compared; trajectories fill in as they are made."""

    name: str
    calculator: Any
    family: str
    header: dict[str, Any]
    frames: list[Atoms] = field(default_factory=list)
    times_fs: list[float] = field(default_factory=list)
    temperature_K: list[float] = field(default_factory=list)


def compare(
    potentials: Sequence[Any] = DEFAULT_PAIR,
    structure: Atoms | str | Path | None = None,
    *,
    settings: CompareSettings | None = None,
    output: str | Path | None = "equimd-compare",
    overwrite: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
) -> CompareResult:
    """Run, label and measure; write trajectories, results.json and report.html to ``output`` (None: a result only).

    Args:
        potentials: Names, paths, Potentials or ASE calculators.
        structure: Where the runs start; by default the ``start.xyz`` of the first potential.
        settings: What is simulated and measured.
        output: A folder that does not exist yet or is empty.
        overwrite: Replace the files of an earlier comparison in ``output``; other files there stay.
        processes: Worker processes that label frames; more than one needs a caller that is importable (spawn).
        progress: Called as work proceeds.

    Raises:
        InputError: an unknown potential, a structure it cannot describe, no reference, an output folder in use.
        SimulationError: the dynamics of a potential explodes; the trajectory up to there stays in ``output``.
    """
    begin = time.monotonic()
    settings = settings or CompareSettings()
    contestants = _contestants(potentials, settings)
    atoms = start_structure(potentials, structure)
    for contestant in contestants:
        _check(contestant, atoms)
    reference = _reference(contestants, settings)
    for contestant in contestants:
        check_level(contestant.calculator, reference, settings.other_level)
    settings = settings.model_copy(update={"reference": reference})
    with _Folder(output, overwrite) as folder:
        job = _Job(atoms, settings, folder, progress or (lambda *_: None))
        for contestant in contestants:
            job.simulate(contestant)
        labelled = [job.label(contestant, processes) for contestant in contestants]
        pooled = [frame for frames in labelled for frame in frames]
        measured = [job.measure(c, own, pooled) for c, own in zip(contestants, labelled, strict=True)]
        result = CompareResult(
            formula=atoms.get_chemical_formula(),
            n_atoms=len(atoms),
            periodic=bool(atoms.pbc.any()),
            reference=reference,
            settings=settings,
            other_levels=_other_levels(contestants, reference),
            potentials=measured,
            verdict=in_words(measured),
            wall_seconds=time.monotonic() - begin,
            provenance=provenance(),
        )
        if output is not None:
            result.write(folder / RESULTS_FILE)
            write_report(result, folder)
    return result


def start_structure(potentials: Sequence[Any], structure: Atoms | str | Path | None) -> Atoms:
    """The structure that runs start from: the one given, or the first potential's ``start.xyz``."""
    if isinstance(structure, Atoms):
        return structure.copy()
    if structure is None:
        first = potentials[0] if len(potentials) else None
        if not isinstance(first, str | Path):
            raise InputError("no structure given; expected one, as the first potential brings none")
        from equimd.models.checkpoint import find_potential

        found = find_potential(first)
        structure = (found if found.is_dir() else found.parent) / "start.xyz"
        if not structure.is_file():
            raise InputError(f"{first} brings no start.xyz; give a structure")
    atoms = next(iter(read_frames(structure)))  # checked by the caller, so no word on its plausibility
    atoms.calc = None
    return atoms


def _contestants(potentials: Sequence[Any], settings: CompareSettings) -> list[Contestant]:
    if isinstance(potentials, str) or not len(potentials):
        raise InputError(f"potentials are {potentials!r}; expected a list of at least one")
    out: list[Contestant] = []
    for potential in potentials:
        calculator = potential
        if isinstance(potential, str | Path) or not callable(getattr(potential, "get_forces", None)):
            from equimd.calculators.ase import EquimdCalculator

            calculator = EquimdCalculator(potential, device=settings.device, dtype=settings.dtype)
        name = as_force_field(calculator).name
        taken = [c.name for c in out]
        if name in taken:
            name = next(f"{name}-{k}" for k in range(2, len(potentials) + 2) if f"{name}-{k}" not in taken)
        header = getattr(calculator, "header", None) or {}
        out.append(Contestant(name, calculator, str(getattr(calculator, "family", "unknown")), header))
    return out


def _check(contestant: Contestant, atoms: Atoms) -> None:
    potential = getattr(contestant.calculator, "potential", None)
    try:
        check_structure(atoms, getattr(potential, "species", None))
    except InputError as error:
        raise InputError(f"{contestant.name}: {error}") from error


def _reference(contestants: Iterable[Contestant], settings: CompareSettings) -> str:
    """The method that labels the frames: the one asked for, or the one all potentials were trained on."""
    if settings.reference is not None:
        known = {settings.reference.lower()}
    else:
        recipes = [c.header.get("recipe") or {} for c in contestants]
        known = {str(r["data"]["reference"]).lower() for r in recipes if (r.get("data") or {}).get("reference")}
    accepted = ", ".join(METHODS)
    if len(known) > 1:
        raise InputError(f"the potentials were trained on {' and '.join(sorted(known))}; choose one reference")
    if not known or not known <= set(METHODS):
        what = f"the reference is {known.pop()!r}" if known else "no potential says what it was trained on"
        raise InputError(f"{what}; accepted as reference: {accepted}")
    return known.pop()


def _other_levels(contestants: Iterable[Contestant], reference: str) -> dict[str, str]:
    """The level of each contestant's training, if it is not that of the reference."""
    levels = {c.name: level_mismatch(c.calculator, reference) for c in contestants}
    return {name: level for name, level in levels.items() if level is not None}


class _Folder:
    """Where files are written: the folder itself if it is new, else a fresh one inside it until all is done."""

    def __init__(self, output: str | Path | None, overwrite: bool) -> None:
        self.output, self.overwrite = None if output is None else Path(output), overwrite
        self.made = False

    def __enter__(self) -> Path:
        if self.output is None:
            self.work = Path(tempfile.mkdtemp(prefix="equimd-"))
            return self.work
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output} is a file; accepted is a new folder")
        self.made = not self.output.exists()
        in_use = not self.made and any(self.output.iterdir())
        if in_use and not self.overwrite:
            raise InputError(
                f"the output folder {self.output} exists and is not empty; choose another (-o) or pass --overwrite"
            )
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=self.output)) if in_use else self.output
        except OSError as error:
            raise InputError(f"cannot write to {self.output}: {error.strerror}") from error
        return self.work

    def __exit__(self, kind: object, *_: object) -> None:
        if self.output is None:
            shutil.rmtree(self.work, ignore_errors=True)
            return
        if kind is None and self.work != self.output:
            for path in sorted(self.work.iterdir()):
                os.replace(path, self.output / path.name)
        for path in (self.work, self.output):
            # A folder that holds nothing is not worth keeping; one that holds something is not ours to remove.
            if (path == self.work or self.made) and path.is_dir() and not any(path.iterdir()):
                path.rmdir()


class _Job:
    """What all potentials of a comparison share, and the steps for each."""

    def __init__(self, atoms: Atoms, settings: CompareSettings, folder: Path, progress: Progress) -> None:
        self.atoms, self.settings, self.folder, self.progress = atoms, settings, folder, progress

    def path(self, contestant: Contestant, ending: str) -> Path:
        """A file of this potential in the output folder."""
        return self.folder / (re.sub(r"[^\w.-]+", "_", contestant.name) + ending)

    def simulate(self, contestant: Contestant) -> None:
        """Langevin dynamics; keeps evenly spaced frames, the start left out."""
        s = self.settings
        stride = max(1, s.steps // s.frames)
        name = f"{contestant.name}: dynamics"
        contestant.frames = self._run(
            contestant, ".h5", name, self.atoms, ensemble="nvt", steps=s.steps, stride=stride
        )[1:]
        contestant.times_fs = [(k + 1) * stride * s.timestep_fs for k in range(len(contestant.frames))]
        contestant.temperature_K = [float(frame.get_temperature()) for frame in contestant.frames]

    def label(self, contestant: Contestant, processes: int) -> list[Atoms]:
        """The frames with the reference's energy and forces, written beside the trajectory."""
        assert self.settings.reference is not None
        stage, n = self._stage(f"{contestant.name}: labels"), len(contestant.frames)
        if n * len(self.atoms) < _ATOMS_WORTH_WORKERS:
            processes = 1
        frames = label(
            contestant.frames, self.settings.reference, processes=processes, progress=lambda done: stage(done, n)
        )
        write_frames(self.path(contestant, "-labelled.xyz"), frames)
        return frames

    def measure(self, contestant: Contestant, own: list[Atoms], pooled: list[Atoms]) -> PotentialResult:
        """Everything that is said of one potential."""
        s, calculator = self.settings, contestant.calculator
        equivariance = equivariance_error(
            calculator,
            own,
            s.degree,
            s.inversion,
            extras=Extras(),
            progress=self._stage(f"{contestant.name}: equivariance"),
        )
        accuracy = evaluate_accuracy(calculator, pooled, progress=self._stage(f"{contestant.name}: accuracy"))
        own_accuracy = evaluate_accuracy(calculator, own)
        drift, energies = self._conservation(contestant)
        throughput = measure_throughput(
            calculator,
            self.atoms,
            s.timestep_fs,
            settings=TimingSettings(
                warmup_seconds=2 * s.timing_seconds, block_seconds=s.timing_seconds, temperature_K=s.temperature_K
            ),
            progress=self._stage(f"{contestant.name}: speed"),
        )
        return _assemble(contestant, own, pooled, (accuracy, own_accuracy, equivariance, drift, energies, throughput))

    def _conservation(self, contestant: Contestant) -> tuple[DriftResult, EnergySeries]:
        """A short NVE run that goes on from the end of the Langevin run, and its drift."""
        s = self.settings
        stride = max(1, s.nve_steps // _NVE_SAMPLES)
        start = contestant.frames[-1].copy()  # equilibrated, with the velocities it has
        name = f"{contestant.name}: energy conservation"
        frames = self._run(contestant, "-nve.h5", name, start, ensemble="nve", steps=s.nve_steps, stride=stride)
        times = np.arange(len(frames)) * stride * s.timestep_fs
        kinetic = np.array([frame.get_kinetic_energy() for frame in frames])
        total = kinetic + [frame.get_potential_energy() for frame in frames]
        per_atom = 1e3 * (total - total[0]) / len(self.atoms)
        series = EnergySeries(times_fs=times.tolist(), mev_per_atom=per_atom.tolist())
        return nve_drift(times, total, len(self.atoms), kinetic), series

    def _run(self, contestant: Contestant, ending: str, stage: str, start: Atoms, **options: Any) -> list[Atoms]:
        """MD from ``start``; the frames of its trajectory, the first included."""
        s, file = self.settings, self.path(contestant, ending)
        md = make_settings(
            timestep_fs=s.timestep_fs,
            temperature_K=s.temperature_K,
            friction_per_fs=s.friction_per_fs,
            seed=s.seed,
            **options,
        )
        result = run_md(start, contestant.calculator, md, file, progress=self._stage(stage))
        if result.stopped is not None:
            raise SimulationError(f"{contestant.name} exploded, {result.stopped}; {file} holds the run up to there")
        file.with_name(file.name + ".state.json").unlink(missing_ok=True)  # only an unfinished run needs it
        return read_list(file)

    def _stage(self, name: str) -> Callable[[int, int], None]:
        self.progress(name, 0, 1)
        return lambda done, total: self.progress(name, done, total)


def _assemble(
    contestant: Contestant,
    own: list[Atoms],
    pooled: list[Atoms],
    parts: tuple[AccuracyResult, AccuracyResult, EquivarianceResult, DriftResult, EnergySeries, ThroughputResult],
) -> PotentialResult:
    accuracy, own_accuracy, equivariance, drift, energies, throughput = parts
    hours = (contestant.header.get("ledger") or {}).get("device_hours")
    potential = getattr(contestant.calculator, "potential", None)
    return PotentialResult(
        name=contestant.name,
        family=contestant.family,
        accuracy=accuracy,
        accuracy_own=own_accuracy,
        equivariance=equivariance,
        nve=drift,
        throughput=throughput,
        verdict=judge(equivariance),
        training_device_hours=None if hours is None else float(hours),
        n_parameters=None if potential is None else sum(p.numel() for p in potential.parameters()),
        trajectory=_trajectory(contestant, own, equivariance),
        nve_energy=energies,
        parity=_parity(contestant.calculator, pooled),
    )


def _trajectory(contestant: Contestant, own: list[Atoms], equivariance: EquivarianceResult) -> Trajectory:
    """Series per frame; the share of the loss of one frame is S / (S + |ā − y|²), as for a quadrature."""
    per_frame = equivariance.per_frame
    squared = [0.0 if e is None else e for e in per_frame.mean_error_squared]
    totals = [s + e for s, e in zip(per_frame.s, squared, strict=True)]
    shares = [100.0 * s / total if total > 0 else float("nan") for s, total in zip(per_frame.s, totals, strict=True)]
    return Trajectory(
        times_fs=contestant.times_fs,
        temperature_K=contestant.temperature_K,
        rmse_equiv=per_frame.rmse_equiv,
        force_rmse=[float(np.sqrt(total)) for total in totals],
        percent_of_loss=shares,
    )


def _parity(calculator: Any, pooled: list[Atoms]) -> Parity:
    """A fixed random choice of force components on the common frames."""
    predicted = np.concatenate([f.ravel() for f in as_force_field(calculator).evaluate(pooled).forces])
    reference = np.concatenate([frame.get_forces(apply_constraint=False).ravel() for frame in pooled])
    chosen = np.random.default_rng(0).permutation(len(reference))[:_PARITY_POINTS]
    return Parity(reference=reference[chosen].tolist(), predicted=predicted[chosen].tolist())
