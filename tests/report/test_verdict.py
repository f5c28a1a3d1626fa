"""The words and their thresholds."""

import math

import pytest
from synthetic import make_potential, make_result

from equimd.analysis.equivariance_results import StressSpread
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
    assert verdict.level == "unknown"
    assert "without labels" in verdict.text


def test_without_labels_the_level_is_unknown_unless_it_is_exact():
    result = make_potential("x", "transformer", 1e-3, 1e-2, 5.0).equivariance.model_copy(update={"loss": None})
    assert judge(result).level == "unknown"
    exact = result.model_copy(update={"force": result.force.model_copy(update={"at_floor": True})})
    assert judge(exact).level == "exact"


def test_no_spread_at_all_is_exact():
    """As on one atom alone, whose force and floor are zero: there is nothing to be relative to."""
    alone = {"relative": math.nan, "floor": 0.0, "at_floor": False}
    assert judged(0.0, **alone).level == "exact"
    assert judged(1e-9, **alone).level != "exact"


def test_a_floor_of_noise_is_not_exact():
    assert judged(2e-3, at_floor=True, floor=1e-3, rms_force=1.0, floor_kind="estimated").level == "visible"
    assert "not above the calculator's own noise of 1.0 meV/Å" in judged(1e-3, at_floor=True, floor=1e-3).text
    assert judged(1e-5, at_floor=True, floor=1e-5, rms_force=1.0).level == "exact"
    # Where forces vanish by symmetry, rounding is all there is.
    assert judged(1e-9, at_floor=True, floor=1e-9, rms_force=1e-9).level == "exact"


def test_inversion_is_named_where_it_makes_most_of_the_error():
    told = judged(1e-3, proper=6e-7, inversion=1e-3).text
    assert told.endswith("most of it comes from inversion, rotations alone make 6.0·10⁻⁴ meV/Å")
    assert "inversion" not in judged(1e-3, proper=8e-4, inversion=6e-4).text
    assert "inversion" not in judged(1e-3, proper=None, inversion=None).text  # as in older results
    assert "inversion" not in judged(1e-9, proper=1e-10, inversion=1e-9, at_floor=True).text


def with_stress(symmetry=1e-9, **stress):
    """A comparison's entry that has a stress of RMS 0.01 eV/Å³ and is exact in its forces."""
    p = make_potential("x", "equivariant", symmetry, 1e-2, 5.0)
    block = StressSpread(rmse_equiv=5e-3, relative=0.5, rms_stress=1e-2, antisymmetric=0.0, rmse_equiv_gpa=0.8)
    update = {"stress": block.model_copy(update=stress)}
    return p.model_copy(update={"equivariance": p.equivariance.model_copy(update=update)})


def test_a_stress_that_does_not_turn_is_told_though_the_forces_are_exact():
    (line,) = (line for line in in_words([with_stress(proper=1e-9, inversion=5e-3)]) if "stress" in line)
    assert line.startswith("The stress of x is not equivariant: its symmetry error is 0.80 GPa, 50 % of its RMS")
    assert "most of it under inversion: rotations alone make 1.6·10⁻⁷ GPa" in line
    assert "inversion" not in next(w for w in in_words([with_stress(proper=5e-3, inversion=1e-9)]) if "stress" in w)
    for silent in (with_stress(relative=1e-3), with_stress(at_floor=True), with_stress(symmetry=9e-3)):
        assert "stress" not in " ".join(in_words([silent]))


def test_suspicious_labels_are_told():
    p = make_result().potentials[0]
    told = p.model_copy(update={"accuracy": p.accuracy.model_copy(update={"suspicious": "these labels are odd"})})
    assert f"{p.name}: these labels are odd." in in_words([told])
    assert "odd" not in " ".join(in_words([p]))


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
