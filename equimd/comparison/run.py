"""The main job: potentials run side by side on one structure, their frames labelled, their errors and costs measured.

Every potential runs its own Langevin trajectory from the same positions and velocities. Frames of all runs are labelled
once with the reference and pooled: accuracy is measured on that common set, so that no potential is judged on easier
structures than another. The equivariance error and its share of the loss belong to the potential's own trajectory,
which is where a simulation meets it.

That a potential explodes is an answer: it stands in the result beside the others, with what could be measured.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms

from equimd.comparison.contestants import (
    DEFAULT_PAIR,
    Contestant,
    check,
    common_reference,
    make_contestants,
    other_levels,
    start_structure,
)
from equimd.comparison.folder import Folder, finished
from equimd.comparison.job import Job, Progress, refuse_without_labels
from equimd.comparison.measure import StoppedWarning, measure
from equimd.references import check_level
from equimd.report import RESULTS_FILE, CompareResult, write_report
from equimd.report.comparison import CompareSettings
from equimd.report.verdict import in_words
from equimd.results import provenance

__all__ = ["StoppedWarning", "compare"]


def compare(
    potentials: Sequence[Any] = DEFAULT_PAIR,
    structure: Atoms | str | Path | None = None,
    *,
    settings: CompareSettings | None = None,
    output: str | Path | None = "equimd-compare",
    overwrite: bool = False,
    resume: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
) -> CompareResult:
    """Run, label and measure; write trajectories, results.json and report.html to ``output`` (None: a result only).

    A potential whose dynamics explodes or whose calculator fails stands in the result with ``stopped``, and a
    ``StoppedWarning`` says so. Frames on which the reference fails are left out, with a ``LabelWarning``.

    Args:
        potentials: Names, paths, Potentials or ASE calculators.
        structure: Where the runs start; by default the ``start.xyz`` of the first potential.
        settings: What is simulated and measured.
        output: A folder that does not exist yet or is empty.
        overwrite: Replace the files of an earlier comparison in ``output``; other files there stay.
        resume: Go on with an unfinished comparison in ``output``, whose trajectories and labels are kept. A finished
            one is read; if there is none, one begins.
        processes: Worker processes that label frames; more than one needs a caller that is importable (spawn).
        progress: Called as work proceeds.

    Raises:
        InputError: an unknown potential, a structure it cannot describe, no reference, a reference that fails on every
            frame, an output folder in use, or a resumed comparison that was begun otherwise.
    """
    begin = time.monotonic()
    settings = settings or CompareSettings()
    contestants = make_contestants(potentials, settings)
    atoms = start_structure(potentials, structure)
    for contestant in contestants:
        check(contestant, atoms)
    reference = common_reference(contestants, settings)
    for contestant in contestants:
        check_level(contestant.calculator, reference, settings.other_level)
    settings = settings.model_copy(update={"reference": reference})
    names = [contestant.name for contestant in contestants]
    if resume and output is not None:
        before = finished(Path(output), names, atoms.get_chemical_formula(), settings)
        if before is not None:
            return before
    with Folder(output, overwrite, resume) as folder:
        folder.begin(settings, names)
        job = Job(atoms, settings, folder.path, progress or (lambda *_: None))
        for contestant in contestants:
            job.simulate(contestant)
        for contestant in contestants:
            job.label(contestant, processes)
        refuse_without_labels(contestants, reference)
        pooled = common_frames(contestants)
        measured = [measure(job, contestant, pooled) for contestant in contestants]
        result = CompareResult(
            formula=atoms.get_chemical_formula(),
            n_atoms=len(atoms),
            periodic=bool(atoms.pbc.any()),
            reference=reference,
            settings=settings,
            other_levels=other_levels(contestants, reference),
            potentials=measured,
            verdict=in_words(measured),
            wall_seconds=time.monotonic() - begin,
            provenance=provenance(),
        )
        if output is not None:
            result.write(folder.path / RESULTS_FILE)
            write_report(result, folder.path)
    return result


def common_frames(contestants: list[Contestant]) -> list[Atoms]:
    """The labelled frames of all runs that reached their end; of all runs if those have none.

    Frames on the way to an explosion are no structures that a simulation should meet.
    """
    whole = [frame for contestant in contestants if contestant.stopped is None for frame in contestant.labelled]
    return whole or [frame for contestant in contestants for frame in contestant.labelled]
