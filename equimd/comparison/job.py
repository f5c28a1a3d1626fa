"""What every contestant goes through before it is measured: its own runs, and the labels of their frames."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.analysis.conservation import DriftResult, nve_drift
from equimd.comparison.contestants import Contestant
from equimd.comparison.folder import LABELS_ENDING
from equimd.errors import InputError
from equimd.frames import PlausibilityWarning, read_list, write_frames
from equimd.md import CalculatorError, UnstableStart, run_md
from equimd.md.constraints import removed_degrees_of_freedom
from equimd.md.settings import make_settings
from equimd.origin import KEY as ORIGIN_KEY
from equimd.references import label_where_possible
from equimd.report.comparison import CompareSettings, EnergySeries, Stopped
from equimd.results import write_text_atomically
from equimd.units import KB_EV_PER_K

# Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

_NVE_SAMPLES = 500
# Starting worker processes takes seconds, as long as labelling this many atoms.
_ATOMS_WORTH_WORKERS = 2000


class Job:
    """What all potentials of a comparison share, and the steps for each; what lies in the folder is not repeated."""

    def __init__(self, atoms: Atoms, settings: CompareSettings, folder: Path, progress: Progress) -> None:
        self.atoms, self.settings, self.folder, self.progress = atoms, settings, folder, progress

    def path(self, contestant: Contestant, ending: str) -> Path:
        """A file of this potential in the output folder."""
        return self.folder / (contestant.stem + ending)

    def simulate(self, contestant: Contestant) -> None:
        """Langevin dynamics; keeps evenly spaced frames, the start left out, and why it stopped if it did."""
        s = self.settings
        name = f"{contestant.name}: dynamics"
        stride = max(1, s.steps // s.frames)
        frames, contestant.stopped = self._run(
            contestant, ".h5", name, self.atoms, ensemble="nvt", steps=s.steps, stride=stride
        )
        contestant.frames = frames[1:]
        contestant.times_fs = [float(frame.info["time_fs"]) for frame in contestant.frames]
        free = 3 * len(self.atoms) - removed_degrees_of_freedom(self.atoms)
        contestant.temperature_K = [
            2.0 * float(frame.get_kinetic_energy()) / (free * KB_EV_PER_K) for frame in contestant.frames
        ]

    def label(self, contestant: Contestant, processes: int) -> None:
        """Give the frames the reference's energy and forces, and write them beside the trajectory."""
        assert self.settings.reference is not None
        stage, n = self.stage(f"{contestant.name}: labels"), len(contestant.frames)
        if n == 0:
            return
        kept = self.path(contestant, LABELS_ENDING)
        if kept.exists():
            contestant.frames, contestant.failed = _kept_labels(kept, contestant.frames)
            return
        if n * len(self.atoms) < _ATOMS_WORTH_WORKERS:
            processes = 1
        contestant.frames, contestant.failed = label_where_possible(
            contestant.frames,
            self.settings.reference,
            processes=processes,
            progress=lambda done: stage(done, n),
            of=f" of {contestant.name}",
            refuse=False,
        )
        if contestant.labelled:
            write_frames(self.path(contestant, "-labelled.xyz"), contestant.labelled)
        _keep_labels(kept, contestant.frames, contestant.failed)

    def conserve(self, contestant: Contestant) -> tuple[DriftResult | None, EnergySeries]:
        """A short NVE run that goes on from the end of the Langevin run, and its drift; none if that end is missing."""
        s = self.settings
        if contestant.stopped is not None or not contestant.frames:
            return None, EnergySeries(times_fs=[], mev_per_atom=[])
        stride = max(1, s.nve_steps // _NVE_SAMPLES)
        last = contestant.frames[-1]  # equilibrated, with the velocities it has
        start = last.copy()
        name = f"{contestant.name}: energy conservation"
        frames, contestant.stopped = self._run(
            contestant, "-nve.h5", name, start, ensemble="nve", steps=s.nve_steps, stride=stride
        )
        times = np.array([frame.info["time_fs"] for frame in frames])
        kinetic = np.array([frame.get_kinetic_energy() for frame in frames])
        total = kinetic + [frame.get_potential_energy() for frame in frames]
        per_atom = 1e3 * (total - total[:1]) / len(self.atoms)
        series = EnergySeries(times_fs=times.tolist(), mev_per_atom=per_atom.tolist())
        whole = contestant.stopped is None
        return (nve_drift(times, total, len(self.atoms), kinetic) if whole else None), series

    def _run(
        self, contestant: Contestant, ending: str, stage: str, start: Atoms, **options: Any
    ) -> tuple[list[Atoms], Stopped | None]:
        """MD from ``start``: the frames of its trajectory, the first included, and why it stopped if it did."""
        s, file = self.settings, self.path(contestant, ending)
        md = make_settings(
            timestep_fs=s.timestep_fs,
            temperature_K=s.temperature_K,
            friction_per_fs=s.friction_per_fs,
            seed=s.seed,
            **options,
        )
        what, reason, time_ps = "explodes", None, 0.0
        try:
            result = run_md(start, contestant.calculator, md, file, resume=True, progress=self.stage(stage))
            if result.stopped is not None:
                reason, time_ps = result.stopped.partition(": ")[2], result.time_ps
        except UnstableStart as error:
            reason = str(error)
        except CalculatorError as error:
            what, reason = "fails", str(error).partition(": ")[2]
            time_ps = error.step * s.timestep_fs / 1e3
        frames = self._frames(file) if file.exists() else []
        if reason is None:
            return frames, None
        return frames, Stopped(
            what=what, ensemble=options["ensemble"], time_ps=time_ps, reason=" ".join(reason.split())
        )

    def _frames(self, file: Path) -> list[Atoms]:
        """A trajectory with the masses and constraints of the start, whatever the file's format keeps of them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlausibilityWarning)  # its units are ours, however small its forces
            frames = read_list(file)
        for frame in frames:
            velocities = frame.get_velocities()
            frame.set_masses(self.atoms.get_masses())  # pyright: ignore[reportArgumentType]
            frame.set_constraint()
            frame.set_velocities(velocities)
            frame.set_constraint(self.atoms.constraints)
        return frames

    def stage(self, name: str) -> Callable[[int, int], None]:
        """The progress of one stage, which begins."""
        self.progress(name, 0, 1)
        return lambda done, total: self.progress(name, done, total)


def refuse_without_labels(contestants: list[Contestant], reference: str) -> None:
    """Refuse to measure errors if the reference labels no frame at all.

    Raises:
        InputError: with the first reason.
    """
    reasons = [reason for contestant in contestants for reason in contestant.failed.values()]
    if reasons and not any(contestant.labelled for contestant in contestants):
        raise InputError(
            f"{reference} fails on all {len(reasons)} frames ({reasons[0]}); accepted: a reference that works"
        )


def _keep_labels(file: Path, frames: list[Atoms], failed: dict[int, str]) -> None:
    """Labels to the last bit, which text formats of frames do not keep."""
    labels = [
        None if frame.calc is None else {key: np.asarray(value).tolist() for key, value in frame.calc.results.items()}
        for frame in frames
    ]
    write_text_atomically(file, json.dumps({"labels": labels, "failed": failed}))


def _kept_labels(file: Path, frames: list[Atoms]) -> tuple[list[Atoms], dict[int, str]]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        pairs = list(zip(frames, stored["labels"], strict=True))
        failed = {int(index): str(reason) for index, reason in stored["failed"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"cannot resume: {file} does not hold the labels of its frames; remove it") from error
    out = []
    for frame, labels in pairs:
        copy = frame.copy()
        copy.info.pop(ORIGIN_KEY, None)  # of results that the labels replace
        if labels is not None:
            results = {k: np.array(v) if isinstance(v, list) else v for k, v in labels.items()}
            copy.calc = SinglePointCalculator(copy, **results)
        out.append(copy)
    return out, failed
