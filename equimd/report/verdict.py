"""Numbers into words, with fixed thresholds, so that two reports with the same words mean the same."""

import math

from equimd.analysis.equivariance_results import EquivarianceResult, ForceSpread, Spread
from equimd.report.comparison import Level, PotentialResult, Verdict
from equimd.report.numbers import number
from equimd.units import GPA

# Symmetry error as a fraction of the model's error: below the first "negligible here", up to the second "visible".
NEGLIGIBLE = 1 / 10
VISIBLE = 1 / 2
# Rounding of a float64 field whose floor was not looked for: some hundred machine epsilons.
EXACT_RELATIVE = 1e-13
# Noise up to here is rounding, or a self-consistent cycle that has converged; a fraction of the RMS force, and in eV/Å
# for frames whose forces vanish. A calculator with more noise hides a symmetry error of that size: it is not "exact".
ROUNDING_RELATIVE, ROUNDING_FORCE = 1e-4, 1e-6
# Fraction of the squared error from which on a part of it is called its source.
MOSTLY = 1 / 2
# A spread of the stress beyond this fraction of its RMS is told where the forces do not tell it.
STRESS_RELATIVE = 1e-2
# Differences count beyond this many standard errors.
SIGNIFICANT = 2.0

WORDS: dict[Level, str] = {
    "exact": "exact: at the rounding floor",
    "negligible": "negligible here",
    "visible": "visible",
    "dominant": "dominant",
    "unknown": "unknown: no labels to compare with",
}


def judge(result: EquivarianceResult) -> Verdict:
    """The verdict on one potential from its equivariance error; needs labels for all but "exact"."""
    loss, force = result.loss, result.force
    ratio = math.sqrt(loss.l_equiv / loss.l_total) if loss and loss.l_total > 0 else float("nan")
    level = _level(ratio, is_exact(force))
    needed = None
    if loss and loss.l_mean > 0:
        needed = max(1, math.ceil(loss.l_equiv / (NEGLIGIBLE**2 * loss.l_mean)))
    size = f"symmetry error {number(1e3 * force.rmse_equiv, 2)} meV/Å"
    if level == "exact":
        text = f"{size}, {WORDS[level]}{' (estimated)' if force.floor_kind == 'estimated' else ''}"
    elif math.isnan(ratio):
        text = f"{size}; without labels there is no error to compare it with"
    else:
        share = f"{100 * ratio:.2g} % of the force error" if ratio < 0.995 else "all of the force error"
        text = f"{size}, {share}: {WORDS[level]}"
    if level != "exact":
        text += _source(force, result.group.inversion)
    return Verdict(level=level, ratio=ratio, rotations_needed=needed, text=text)


def is_exact(force: ForceSpread) -> bool:
    """Whether the error is that of rounding, and the rounding small enough to say so."""
    if force.floor is None or not force.at_floor:
        return force.rmse_equiv == 0 or force.relative < EXACT_RELATIVE
    return force.floor <= max(ROUNDING_RELATIVE * force.rms_force, ROUNDING_FORCE)


def _source(force: ForceSpread, inversion: bool) -> str:
    """Where an error that is not exact comes from, if one thing makes most of it: noise, or inversion."""
    if force.at_floor:
        return f"; it is not above the calculator's own noise of {number(1e3 * (force.floor or 0), 2)} meV/Å"
    if not inversion or not from_inversion(force):
        return ""
    alone = f"{number(1e3 * (force.proper or 0), 2)} meV/Å"
    return f"; most of it comes from inversion, rotations alone make {alone}"


def from_inversion(spread: Spread) -> bool:
    """Whether inversion makes most of the squared error."""
    if spread.proper is None or spread.inversion is None:
        return False
    return spread.inversion**2 > MOSTLY * (spread.proper**2 + spread.inversion**2)


def stress_in_words(result: EquivarianceResult) -> str | None:
    """A sentence if the stress does not turn with the structure though the forces hardly show it, else None."""
    stress, level = result.stress, judge(result).level
    if stress is None or stress.at_floor or not stress.relative > STRESS_RELATIVE:
        return None
    if level not in ("exact", "negligible", "unknown"):
        return None
    source = ""
    if from_inversion(stress):
        source = f", most of it under inversion: rotations alone make {number((stress.proper or 0) / GPA, 2)} GPa"
    size = f"{number(stress.rmse_equiv_gpa, 2)} GPa, {100 * stress.relative:.2g} % of its RMS"
    return f"The stress of {result.name} is not equivariant: its symmetry error is {size}{source}."


def _level(ratio: float, exact: bool) -> Level:
    if exact:
        return "exact"
    if math.isnan(ratio):
        return "unknown"
    if ratio < NEGLIGIBLE:
        return "negligible"
    return "visible" if ratio <= VISIBLE else "dominant"


def in_words(potentials: list[PotentialResult]) -> list[str]:
    """The comparison in sentences: survival and symmetry of each, then accuracy, speed and energy conservation."""
    lines = [line for p in potentials for line in _survival(p)]
    lines += [f"{p.name}: {p.verdict.text}." for p in potentials if p.verdict is not None]
    lines += [line for p in potentials if p.equivariance is not None and (line := stress_in_words(p.equivariance))]
    lines += [f"{p.name}: {p.accuracy.suspicious}." for p in potentials if p.accuracy and p.accuracy.suspicious]
    lines += [line for p in potentials if (line := _averaging(p))]
    if len(potentials) > 1:
        lines += [_accuracy(potentials), _speed(potentials)]
    return [line for line in (*lines, _drift(potentials)) if line]


def _survival(p: PotentialResult) -> list[str]:
    """What went wrong in the runs of a potential: nothing, an explosion, a bond, missing labels."""
    lines = [f"{p.name}: {p.stopped.in_words()}."] if p.stopped is not None else []
    if p.stability is not None and p.stability.broken_bond is not None:
        i, j = p.stability.broken_bond
        lines.append(
            f"{p.name}: the distance of atoms {i} and {j}, which are bonded at the start, changes by more than"
            f" {p.stability.tolerance:g} Å at {number(p.stability.first_broken_ps)} ps."
        )
    if p.n_failed:
        lines.append(f"The reference fails on {p.n_failed} frames of {p.name}, which are left out of its errors.")
    return lines


def _averaging(p: PotentialResult) -> str:
    if p.verdict is None or p.verdict.level in ("exact", "negligible"):
        return ""
    k = p.verdict.rotations_needed
    if k is None or k < 2:
        return ""
    return f"Averaging {p.name} over {k} random rotations, at {k} times its cost, would make it negligible."


def _accuracy(potentials: list[PotentialResult]) -> str:
    errors = {p.name: p.accuracy.force.mae for p in potentials if p.accuracy is not None and p.accuracy.force}
    if len(errors) < 2:
        return "Forces could not be compared with the reference."
    ranked = sorted(errors, key=lambda name: errors[name])
    best, last = errors[ranked[0]], errors[ranked[-1]]
    factor = last / best if best > 0 else float("inf")
    if factor < 1.05:
        return "On the same frames their force errors are the same within 5 %."
    return f"On the same frames {ranked[0]} has the smaller force error, by a factor of {factor:.2g}."


def _speed(potentials: list[PotentialResult]) -> str:
    timed = {p.name: p.throughput for p in potentials if p.throughput is not None}
    if len(timed) < 2:
        return ""
    ranked = sorted(timed, key=lambda name: timed[name].ms_per_step.median)
    factor = timed[ranked[-1]].ms_per_step.median / timed[ranked[0]].ms_per_step.median
    unstable = [name for name, throughput in timed.items() if throughput.unstable]
    note = f" (timings of {' and '.join(unstable)} were unstable: the machine was busy)" if unstable else ""
    if factor < 1.05:
        return f"They run equally fast within 5 %{note}."
    return f"{ranked[0]} runs {factor:.2g} times faster{note}."


def _drift(potentials: list[PotentialResult]) -> str:
    measured = {p.name: p.nve for p in potentials if p.nve is not None}
    if not measured:
        return "No potential reached the end of its NVE run, so energy conservation is not known."
    drifting = [p for p in potentials if drift_is_significant(p)]
    if not drifting:
        duration = next(iter(measured.values())).duration_ps
        who = "no run" if len(measured) == len(potentials) else "no run that reached its end"
        return f"In {duration:g} ps of NVE {who} gains or loses more energy than it fluctuates by."
    parts = [f"{p.name} by {number(measured[p.name].drift_mev_per_atom_per_ps, 2)} meV/atom/ps" for p in drifting]
    return f"Energy drifts in NVE with {' and '.join(parts)}."


def drift_is_significant(p: PotentialResult) -> bool:
    """Whether the NVE drift is beyond two standard errors, and over the run beyond two fluctuations of the energy.

    The second is needed because the energy that Verlet's integrator conserves differs from the true one by an amount
    that follows the flow of energy between vibrations: in a run of a few ps that looks like a trend whose error bar
    knows nothing of slower changes.
    """
    nve = p.nve
    if nve is None:
        return False
    change = abs(nve.drift_mev_per_atom_per_ps)
    beyond_errors = change > SIGNIFICANT * nve.stderr
    return beyond_errors and change * nve.duration_ps > SIGNIFICANT * nve.fluctuation_mev_per_atom
