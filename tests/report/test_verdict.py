"""The words and their thresholds."""

import math

import pytest
from synthetic import make_potential, make_result

from equimd.report.verdict import drift_is_significant, in_words, judge


def judged(symmetry: float, total: float = 1e-2, **force):
    """The verdict for exact values of L_equiv = symmetry² and L_total = total²."""
    result = make_potential("x", "transformer", 1.0, 1.0, 5.0).equivariance
    loss = result.loss.model_copy(
        update={"l_equiv": symmetry**2, "l_total": total**2, "l_mean": max(0.0, total**2 - symmetry**2)}
    )
    update = {"rmse_equiv": symmetry, "relative": symmetry, "at_floor": False} | force
    return judge(result.model_copy(update={"loss": loss, "force": result.force.model_copy(update=update)}))


@pytest.mark.parametrize(
    ("ratio", "level"),
    [(0.0999, "negligible"), (0.1001, "visible"), (0.4999, "visible"), (0.5001, "dominant"), (1.0, "dominant")],
)
def test_thresholds(ratio, level):
    verdict = judged(ratio * 1e-2)
    assert verdict.level == level
    assert verdict.ratio == pytest.approx(ratio)


def test_at_the_floor_is_exact_whatever_the_ratio():
    assert judged(0.9e-2, at_floor=True).level == "exact"
    assert judged(0.9e-2).level == "dominant"


def test_float64_rounding_is_exact_without_a_floor():
    assert judged(1e-16, relative=1e-15, floor=None).level == "exact"
    assert judged(1e-9, relative=1e-9, floor=None).level == "negligible"


def test_rotations_needed_bring_the_share_below_a_tenth():
    verdict = judged(3e-3)
    l_equiv, l_mean = 9e-6, 1e-4 - 9e-6
    k = verdict.rotations_needed
    # Averaging K independent rotations divides the spread's square by K and leaves the rest.
    assert math.sqrt(l_equiv / k) <= 0.1 * math.sqrt(l_mean) < math.sqrt(l_equiv / (k - 1))
    assert judged(1e-5).rotations_needed == 1
    assert judged(1e-2).rotations_needed is None


def test_without_labels_there_is_no_share():
    result = make_potential("x", "transformer", 1e-3, 1e-2, 5.0).equivariance.model_copy(update={"loss": None})
    verdict = judge(result)
    assert math.isnan(verdict.ratio)
    assert "without labels" in verdict.text


def test_words_name_the_better_the_faster_and_the_drift():
    words = " ".join(in_words(make_result().potentials))
    assert "ethanol-equivariant has the smaller force error" in words
    assert "ethanol-transformer runs" in words
    assert "no run gains or loses more energy than it fluctuates by" in words


def drifting(fluctuations: float, errors: float):
    """A potential whose energy changes by so many fluctuations over the run, and so many standard errors."""
    p = make_result().potentials[0]
    drift = fluctuations * p.nve.fluctuation_mev_per_atom / p.nve.duration_ps
    update = {"drift_mev_per_atom_per_ps": drift, "stderr": abs(drift) / errors}
    return p.model_copy(update={"nve": p.nve.model_copy(update=update)})


def test_a_drift_counts_beyond_two_standard_errors_and_two_fluctuations():
    assert drift_is_significant(drifting(3, 3))
    assert drift_is_significant(drifting(-3, 3))
    assert not drift_is_significant(drifting(3, 1))
    assert not drift_is_significant(drifting(1, 3))
    assert "Energy drifts in NVE with ethanol-equivariant by −" in in_words([drifting(-3, 3)])[-1]
