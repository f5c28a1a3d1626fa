"""The result of a comparison, as it is written to results.json: everything that a report shows, and nothing besides."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from equimd.analysis.accuracy import AccuracyResult
from equimd.analysis.conservation import DriftResult
from equimd.analysis.equivariance_results import EquivarianceResult
from equimd.analysis.stability import StabilityResult
from equimd.analysis.throughput import ThroughputResult
from equimd.errors import InputError
from equimd.results import Block, Number, Provenance, Result

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"

Level = Literal["exact", "negligible", "visible", "dominant", "unknown"]


class CompareSettings(Block):
    """What is simulated and measured; the defaults take about two minutes for nine atoms on two cores.

    steps, timestep_fs, temperature_K, friction_per_fs: Langevin dynamics with each potential, from the same start and
    the same velocities. frames: how many frames of each run are labelled and measured, evenly spaced. degree,
    inversion: the quadrature of the equivariance error. nve_steps: length of the energy-conservation run, which goes on
    from the end of the Langevin run.
    reference: method that labels the frames; null takes the one that the potentials were trained on.
    other_level: the reference may be another level of theory than that of the training.
    """

    steps: int = Field(default=2000, ge=1)
    timestep_fs: float = Field(default=0.5, gt=0)
    temperature_K: float = Field(default=300.0, gt=0)
    friction_per_fs: float = Field(default=0.01, gt=0)
    seed: int = 0
    frames: int = Field(default=50, ge=1)
    nve_steps: int = Field(default=2000, ge=10)
    degree: int = Field(default=4, ge=0)
    inversion: bool = True
    reference: str | None = None
    other_level: bool = False
    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    timing_seconds: float = Field(default=0.5, gt=0)


class Trajectory(Block):
    """Per-frame series along one potential's own run: fs, K, eV/Å per component, percent.

    force_rmse and percent_of_loss are null for frames on which the reference failed.
    """

    times_fs: list[float]
    temperature_K: list[float]
    rmse_equiv: list[float]
    force_rmse: list[Number]
    percent_of_loss: list[Number]


class EnergySeries(Block):
    """Total energy relative to the start of the NVE run, meV per atom."""

    times_fs: list[float]
    mev_per_atom: list[float]


class Parity(Block):
    """Force components on the common frames, a fixed random choice of them: reference and prediction in eV/Å."""

    reference: list[float]
    predicted: list[float]


class Verdict(Block):
    """Symmetry error against the model's error, with the fixed thresholds of ``report.verdict``.

    level: "unknown" where there is no error to compare with and the symmetry error is above rounding.
    ratio: sqrt(L_equiv / L_total) on the potential's own frames. rotations_needed: random rotations whose average
    brings the symmetry error below one tenth of the error that averaging cannot remove; 1 where it is there already,
    null where that error is zero.
    """

    level: Level
    ratio: Number
    rotations_needed: int | None
    text: str


class Stopped(Block):
    """Why a run ended before its last step: the dynamics left what a molecule can do, or the calculator raised."""

    what: Literal["explodes", "fails"]
    ensemble: Literal["nvt", "nve"]
    time_ps: float
    reason: str

    def briefly(self) -> str:
        """What happened and when."""
        return f"{self.what} at {self.time_ps:.4g} ps{' of NVE' if self.ensemble == 'nve' else ''}"

    def in_words(self) -> str:
        """What happened, when, and why, with the potential as subject."""
        return f"it {self.briefly()}: {self.reason}"


class PotentialResult(Block):
    """Everything measured of one potential; a part that could not be measured is null.

    stopped: why the Langevin run or the NVE run ended before its last step; null if both are whole. The symmetry error
    is then that of the frames before. stability: whether the bonds of the start held along the Langevin run.
    n_failed: frames of its run that the reference could not label. missing: why a part is null, by its name.
    accuracy: on the common frames, which are those of all whole runs pooled, so that potentials are compared on the
    same structures. accuracy_own: on the frames of its own run, as are equivariance and its share of the loss.
    training_device_hours: from the checkpoint's ledger, null where unknown.
    """

    name: str
    family: str
    accuracy: AccuracyResult | None
    accuracy_own: AccuracyResult | None
    equivariance: EquivarianceResult | None
    nve: DriftResult | None
    throughput: ThroughputResult | None
    verdict: Verdict | None
    training_device_hours: float | None
    n_parameters: int | None
    trajectory: Trajectory
    nve_energy: EnergySeries
    parity: Parity
    stopped: Stopped | None = None
    stability: StabilityResult | None = None
    n_failed: int = 0
    missing: dict[str, str] = {}


class CompareResult(Result):
    """The main job's result: potentials measured side by side on one structure.

    other_levels: for each potential whose training had another level of theory than the reference, that level.
    """

    formula: str
    n_atoms: int
    periodic: bool
    reference: str
    settings: CompareSettings
    other_levels: dict[str, str] = {}
    potentials: list[PotentialResult]
    verdict: list[str]
    wall_seconds: float
    provenance: Provenance


def load_results(path: str | Path) -> CompareResult:
    """The result in a folder's results.json, or in a file of that form.

    Raises:
        InputError: there is no such file, or it does not hold a comparison that this version understands.
    """
    path = Path(path)
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        return CompareResult.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); expected the results.json of a comparison") from error
    except (ValidationError, UnicodeDecodeError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else "its bytes"
        raise InputError(f"{file} is no comparison of this version (see {where or 'the text'})") from error
