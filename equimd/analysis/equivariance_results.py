"""What ``equivariance_error`` returns: frozen, with the units of every field."""

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


class ForceSpread(Block):
    """Equivariance error of the forces, eV/Å per component unless said otherwise.

    relative: to rms_force, the RMS of the twirled forces. stderr: of rmse_equiv, with the statistical inefficiency of
    the frames. p95: 95th percentile over frames. floor: RMS of the float32 error, null where there is one precision
    only or the measurement is not in float32; at_floor: rmse_equiv below three floors, false where there is no floor.
    net_torque_rms: eV, molecules only.
    """

    rmse_equiv: float
    relative: Number
    stderr: Number
    p95: float
    worst_frame: WorstFrame
    worst_atom: WorstAtom
    floor: float | None
    at_floor: bool
    floor_frames: int
    per_element: dict[str, float]
    rms_force: float
    net_torque_rms: float | None


class EnergySpread(Block):
    """Standard deviation of the total energy over the group, divided by N, root mean square over frames, eV."""

    std_per_atom: float


class StressSpread(Block):
    """Spread of the back-rotated stress and RMS of its antisymmetric part, eV/Å³ per component."""

    rmse_equiv: float
    antisymmetric: float


class LossShare(Block):
    """The squared force error, (eV/Å)² per component, pooled over the labelled frames; stderr: of percent_of_loss."""

    n_frames: int
    l_total: float
    l_mean: float
    l_equiv: float
    percent_of_loss: Number
    stderr: Number
    correlation_with_force_error: Number


class DegreeCheck(Block):
    """The error on some frames with the next finer quadrature, and by how much it changed there."""

    degree: int
    n_frames: int
    rmse_equiv: float
    relative_change: Number


class PerFrame(Block):
    """What everything can be recomputed from; one value per frame, means over components.

    s = Σ w_k |a_k − ā|² without correction; mean_error_squared = |ā − y|²; n_rotations = K. eV and Å.
    """

    n_atoms: list[int]
    n_rotations: list[int]
    rmse_equiv: list[float]
    s: list[float]
    mean_error_squared: list[float | None]
    mean_force_squared: list[float]
    energy_variance: list[float]
    floor: list[float | None]


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
