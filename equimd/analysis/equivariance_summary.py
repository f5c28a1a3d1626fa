"""From what single frames contribute to the blocks of an ``EquivarianceResult``.

Pooled quantities divide sums over frames, never average ratios. Error bars are s·sqrt(g/n) with the statistical
inefficiency g of the per-frame series (``statistics``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols

from equimd.analysis.equivariance_results import (
    EnergySpread,
    ForceSpread,
    LossShare,
    PerFrame,
    StressSpread,
    WorstAtom,
    WorstFrame,
)
from equimd.analysis.statistics import Estimate, correlation, ratio_estimate
from equimd.analysis.suspicion import suspicion
from equimd.decomposition import percent_of_loss
from equimd.units import GPA

# A result below this many floors cannot be told from rounding.
FLOORS = 3.0


@dataclass
class Squares:
    """Mean square spread of one quantity over the group: in all, its two parts, and of rounding; None where unknown."""

    total: float
    proper: float
    inversion: float | None
    floor: float | None = None


@dataclass
class FrameSpread:
    """What one frame contributes; forces in eV/Å, energies in eV (of the total), stress in eV/Å³, torque in eV."""

    spread: np.ndarray  # (N,) Σ w_k |a_k − ā|², corrected where random
    mean: np.ndarray  # (N, 3) ā
    force: Squares
    energy: Squares
    stress: Squares | None
    stress_squared: float | None
    antisymmetric_squared: float | None
    torque_squared: float | None
    n_rotations: int
    corrected: bool
    l_total: float | None = None
    l_mean: float | None = None
    mean_error_squared: float | None = None
    forces_and_labels: tuple[np.ndarray, np.ndarray] | None = None  # of the frame as it is
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))

    @property
    def l_equiv(self) -> float:
        """L_equiv of the frame in (eV/Å)²."""
        return self.force.total

    @property
    def s(self) -> float:
        """S = Σ w_k |a_k − ā|² without the correction, mean over components."""
        k = self.n_rotations
        return self.l_equiv * ((k - 1) / k if self.corrected else 1.0)


FloorKind = Literal["measured", "estimated"] | None


def _pool(squares: Sequence[Squares], weights: np.ndarray, kind: FloorKind) -> tuple[float, dict[str, Any]]:
    """The pooled root mean square, and the fields of ``Spread``; each frame counts by its weight (n,)."""

    def estimate(values: list[float]) -> Estimate:
        return ratio_estimate(weights * values, weights)

    total = estimate([s.total for s in squares])
    rmse = float(np.sqrt(total.value))
    floor = _floor([(s.floor, w) for s, w in zip(squares, weights, strict=True) if s.floor is not None], kind)
    proper, proper_stderr = _root(estimate([s.proper for s in squares]))
    inversion, inversion_stderr = None, float("nan")
    if all(s.inversion is not None for s in squares):
        inversion, inversion_stderr = _root(estimate([s.inversion or 0.0 for s in squares]))
    return rmse, {
        # d sqrt(x) = dx / (2 sqrt(x))
        "stderr": total.stderr / (2 * rmse) if rmse > 0 else 0.0,
        "proper": proper,
        "proper_stderr": proper_stderr,
        "inversion": inversion,
        "inversion_stderr": inversion_stderr,
        "floor": floor,
        "at_floor": floor is not None and rmse < FLOORS * floor,
    }


def _floor(squares: list[tuple[float, float]], kind: FloorKind) -> float | None:
    """The pooled root mean square; of estimates the median, since a discontinuity shows more than rounding."""
    if not squares:
        return None
    if kind == "estimated":
        return float(np.sqrt(np.median([square for square, _ in squares])))
    return float(np.sqrt(sum(square * w for square, w in squares) / sum(w for _, w in squares)))


def _root(square: Estimate) -> tuple[float, float]:
    """The root of an estimate that may be zero or negative, and how much further up one standard error reaches."""
    root = float(np.sqrt(max(square.value, 0.0)))
    return root, float(np.sqrt(max(square.value + square.stderr, root**2)) - root) if square.stderr >= 0 else np.nan


def force_block(spreads: list[FrameSpread], kind: FloorKind) -> ForceSpread:
    """The forces, pooled over components."""
    components = np.array([3.0 * len(s.spread) for s in spreads])
    rmse, fields = _pool([s.force for s in spreads], components, kind)
    force_rms = float(np.sqrt(sum((s.mean**2).sum() for s in spreads) / components.sum()))
    per_frame = np.sqrt([s.l_equiv for s in spreads])
    worst = int(per_frame.argmax())
    return ForceSpread(
        rmse_equiv=rmse,
        relative=rmse / force_rms if force_rms > 0 else float("nan"),
        p95=float(np.percentile(per_frame, 95)),
        worst_frame=WorstFrame(index=worst, rmse_equiv=float(per_frame[worst])),
        worst_atom=_worst_atom(spreads),
        floor_kind=kind if fields["floor"] is not None else None,
        floor_frames=sum(s.force.floor is not None for s in spreads),
        per_element=_per_element(spreads),
        rms_force=force_rms,
        net_torque_rms=_root_mean([s.torque_squared for s in spreads]),
        **fields,
    )


def _worst_atom(spreads: list[FrameSpread]) -> WorstAtom:
    frame = int(np.argmax([s.spread.max() for s in spreads]))
    atom = int(spreads[frame].spread.argmax())
    return WorstAtom(
        frame=frame,
        index=atom,
        element=chemical_symbols[spreads[frame].numbers[atom]],
        rmse_equiv=float(np.sqrt(spreads[frame].spread[atom] / 3)),
    )


def _per_element(spreads: list[FrameSpread]) -> dict[str, float]:
    numbers = np.concatenate([s.numbers for s in spreads])
    spread = np.concatenate([s.spread for s in spreads])
    return {chemical_symbols[z]: float(np.sqrt(spread[numbers == z].mean() / 3)) for z in np.unique(numbers)}


def energy_block(spreads: list[FrameSpread], kind: FloorKind) -> EnergySpread:
    """The energy per atom; every frame counts the same."""
    scaled = []
    for s in spreads:
        n2 = len(s.spread) ** 2
        values = (s.energy.total, s.energy.proper, s.energy.inversion, s.energy.floor)
        scaled.append(Squares(*(None if v is None else v / n2 for v in values)))  # pyright: ignore[reportArgumentType]
    std, fields = _pool(scaled, np.ones(len(scaled)), kind)
    return EnergySpread(std_per_atom=std, **fields)


def stress_block(spreads: list[FrameSpread], kind: FloorKind) -> StressSpread | None:
    """The stress, over the frames that have one."""
    squares = [s.stress for s in spreads if s.stress is not None]
    if not squares:
        return None
    rmse, fields = _pool(squares, np.ones(len(squares)), kind)
    antisymmetric = _root_mean([s.antisymmetric_squared for s in spreads]) or 0.0
    rms = _root_mean([s.stress_squared for s in spreads]) or 0.0
    return StressSpread(
        rmse_equiv=rmse,
        relative=rmse / rms if rms > 0 else float("nan"),
        rms_stress=rms,
        antisymmetric=antisymmetric,
        rmse_equiv_gpa=rmse / GPA,
        antisymmetric_gpa=antisymmetric / GPA,
        **fields,
    )


def _root_mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.sqrt(np.mean(known))) if known else None


def loss_block(spreads: list[FrameSpread]) -> LossShare | None:
    """Pool numerator and denominator over the labelled frames, then divide."""
    labelled = [s for s in spreads if s.l_mean is not None]
    if not labelled:
        return None
    n = np.array([len(s.spread) for s in labelled], dtype=float)
    n_equiv = n * [s.l_equiv for s in labelled]
    n_mean = n * np.array([s.l_mean for s in labelled])
    n_total = n * np.array([s.l_total for s in labelled])
    l_mean, l_equiv = float(n_mean.sum() / n.sum()), float(n_equiv.sum() / n.sum())
    return LossShare(
        n_frames=len(labelled),
        l_total=float(n_total.sum() / n.sum()),
        l_mean=l_mean,
        l_equiv=l_equiv,
        percent_of_loss=percent_of_loss(l_mean, l_equiv),
        stderr=100.0 * ratio_estimate(n_equiv, n_total).stderr,
        correlation_with_force_error=correlation(
            np.sqrt([s.l_equiv for s in labelled]), np.sqrt([s.mean_error_squared or 0.0 for s in labelled])
        ),
        suspicious=suspicion(s.forces_and_labels for s in labelled if s.forces_and_labels is not None),
    )


def per_frame_block(spreads: list[FrameSpread]) -> PerFrame:
    """The series that everything can be recomputed from."""
    return PerFrame(
        n_atoms=[len(s.spread) for s in spreads],
        n_rotations=[s.n_rotations for s in spreads],
        rmse_equiv=[float(np.sqrt(s.l_equiv)) for s in spreads],
        s=[s.s for s in spreads],
        mean_error_squared=[s.mean_error_squared for s in spreads],
        mean_force_squared=[float((s.mean**2).mean()) for s in spreads],
        energy_variance=[s.energy.total for s in spreads],
        floor=[None if s.force.floor is None else float(np.sqrt(s.force.floor)) for s in spreads],
        inversion_squared=[s.force.inversion for s in spreads],
        energy_inversion_squared=[s.energy.inversion for s in spreads],
        stress_variance=[None if s.stress is None else s.stress.total for s in spreads],
        stress_inversion_squared=[None if s.stress is None else s.stress.inversion for s in spreads],
    )
