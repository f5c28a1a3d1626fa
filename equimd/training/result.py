"""What a finished training says of itself, in result.json."""

from typing import Literal

from equimd.results import Block, Number, Result
from equimd.training.dynamics import SymmetryRecord
from equimd.training.precision import PrecisionReport
from equimd.training.sections import BatchSection
from equimd.training.validation import Errors

RESULT_FILE = "result.json"


class SymmetrySummary(Block):
    """L_mean and L_equiv in (eV/Å)² on validation frames; null without force labels."""

    l_mean: Number
    l_equiv: float
    percent_of_loss: Number

    @classmethod
    def of(cls, record: SymmetryRecord | None) -> "SymmetrySummary | None":
        """The summary of a record."""
        return None if record is None else cls(**record._asdict())


class TrainingResult(Result):
    """A finished training: errors of the best average of the weights, and what it cost.

    muon_learning_rate is that of hidden matrices, where it is another. batch is over all devices, frames_per_s the
    training throughput of all of them over the whole run (a rotated copy counts as a frame), hours those of the clock,
    device_hours these times the devices, cpu_hours the CPU time of all processes, summed over sessions. shared says
    that the machine did other work: hours are then an upper bound, frames_per_s a lower one.
    """

    name: str
    family: str
    stopped: Literal["finished", "early stopping", "budget"]
    steps: int
    epochs: float
    best_step: int
    n_parameters: int
    batch: BatchSection
    learning_rate: float
    muon_learning_rate: float | None = None
    device: str
    n_devices: int
    hours: float
    device_hours: float
    cpu_hours: float | None = None
    shared: bool | None = None
    frames_per_s: float | None
    sessions: int
    valid: Errors
    test: Errors | None
    symmetry: SymmetrySummary | None
    precision: PrecisionReport | None
    versions: dict[str, str]
