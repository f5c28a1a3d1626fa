"""What ``equivariance_error`` returns: frozen, with the units of every field."""

from typing import Literal

from equimd.results import Block, Number, Provenance, Result


class Group(Block):
    """The group elements of each frame: "quadrature" of a degree, or "random" with a seed."""

    kind: str
    degree: int | None
    inversion: bool
    n_rotations: int
    seed: int | None = None


class WorstFrame(Block):
    """The frame with the largest error, eV/Å per component."""

    index: int
    rmse_equiv: float


class WorstAtom(Block):
    """The atom with the largest error in any frame, eV/Å per component."""

    frame: int
    index: int
    element: str
    rmse_equiv: float


class Spread(Block):
    """Equivariance error of one quantity: a root mean square over the group, and over frames.

    Over O(3), error² = proper² + inversion². proper: the error over SO(3), root mean square of the structure and its
    mirror image; inversion: half the difference between the means of the two. Over SO(3) proper is the whole error and
    inversion is null. Both are null in results of version 0.1.0. With random rotations both are roots of unbiased
    estimates, 0 if an estimate is negative. Standard errors hold the statistical inefficiency of the frames.
    floor: the rounding of the force field in the same units; at_floor: the error is below three floors.
    """

    stderr: Number = float("nan")
    proper: float | None = None
    proper_stderr: Number = float("nan")
    inversion: float | None = None
    inversion_stderr: Number = float("nan")
    floor: float | None = None
    at_floor: bool = False


class ForceSpread(Spread):
    """Equivariance error of the forces, eV/Å per component unless said otherwise.

    relative: to rms_force, the RMS of the twirled forces. stderr: of rmse_equiv. p95: 95th percentile over frames.
    floor: "measured" as the RMS difference of float32 from float64 where the force field offers both and is in float32;
    "estimated" from differences along a short line (``analysis.noise``) for every other one; floor_kind says which, and
    is null, as the floor is, where none was asked for or predictions are random by intent.
    net_torque_rms: eV, molecules only.
    """

    rmse_equiv: float
    relative: Number
    p95: float
    worst_frame: WorstFrame
    worst_atom: WorstAtom
    floor_kind: Literal["measured", "estimated"] | None = None
    floor_frames: int
    per_element: dict[str, float]
    rms_force: float
    net_torque_rms: float | None


class EnergySpread(Spread):
    """Standard deviation of the total energy over the group, divided by N, root mean square over frames, eV."""

    std_per_atom: float


class StressSpread(Spread):
    """Spread of the back-rotated stress and RMS of its antisymmetric part, eV/Å³ per component; *_gpa in GPa.

    relative: to rms_stress, the RMS of the stress over rotations and frames. antisymmetric: 0 for calculators that
    return six numbers.
    """

    rmse_equiv: float
    relative: Number = float("nan")
    rms_stress: Number = float("nan")
    antisymmetric: float
    rmse_equiv_gpa: Number = float("nan")
    antisymmetric_gpa: Number = float("nan")


class LossShare(Block):
    """The squared force error, (eV/Å)² per component, pooled over the labelled frames; stderr: of percent_of_loss.

    suspicious: a sentence if labels seem to be the potential's own predictions, else null.
    """

    n_frames: int
    l_total: float
    l_mean: float
    l_equiv: float
    percent_of_loss: Number
    stderr: Number
    correlation_with_force_error: Number
    suspicious: str | None = None


class DegreeCheck(Block):
    """The error on some frames with the next finer quadrature, and by how much it changed there."""

    degree: int
    n_frames: int
    rmse_equiv: float
    relative_change: Number


class PerFrame(Block):
    """What everything can be recomputed from; one value per frame, means over components.

    s = Σ w_k |a_k − ā|² without correction; mean_error_squared = |ā − y|²; n_rotations = K. inversion_squared,
    energy_inversion_squared, stress_inversion_squared: the parts that inversion adds (the estimates of random rotations
    can be negative), null over SO(3). eV and Å.
    """

    n_atoms: list[int]
    n_rotations: list[int]
    rmse_equiv: list[float]
    s: list[float]
    mean_error_squared: list[float | None]
    mean_force_squared: list[float]
    energy_variance: list[float]
    floor: list[float | None]
    inversion_squared: list[float | None] = []
    energy_inversion_squared: list[float | None] = []
    stress_variance: list[float | None] = []
    stress_inversion_squared: list[float | None] = []


class EquivarianceResult(Result):
    """Equivariance error of a force field over frames.

    other_level: in words, if the reference is another level of theory than that of the potential's training.
    lossy: how the format of the frames rounded positions; null if it did not.
    """

    name: str
    device: str
    dtype: str
    n_frames: int
    group: Group
    force: ForceSpread
    energy: EnergySpread
    stress: StressSpread | None
    loss: LossShare | None
    degree_check: DegreeCheck | None
    per_frame: PerFrame
    other_level: str | None = None
    lossy: str | None = None
    provenance: Provenance
