"""The one clear table: its rows as text, for the terminal (rich) and for the page."""

from collections.abc import Callable
from typing import Any, NamedTuple

from equimd.analysis.accuracy import AccuracyResult, Errors
from equimd.analysis.equivariance_results import EquivarianceResult
from equimd.analysis.stability import StabilityResult
from equimd.analysis.throughput import ThroughputResult
from equimd.references import METHODS
from equimd.report.comparison import CompareResult
from equimd.report.numbers import number, with_error
from equimd.report.verdict import WORDS
from equimd.units import GPA


class Row(NamedTuple):
    """A line of the table: what it is, its unit, one text per potential."""

    label: str
    unit: str
    values: list[str]


def rows(result: CompareResult) -> list[Row]:
    """The table of a comparison, from accuracy to cost; a dash stands for what could not be measured."""
    out = [
        Row(label, unit, [_text(getattr(p, part), value) for p in result.potentials])
        for label, unit, part, value in _TABLE
    ]
    if any(p.stopped is not None for p in result.potentials):
        ends = [p.stopped.briefly() if p.stopped is not None else "to its end" for p in result.potentials]
        out.insert(0, Row("Molecular dynamics", "", ends))
    return [row for row in out if any(value != "–" for value in row.values)]


def _text(part: Any, value: Callable[[Any], str]) -> str:
    return "–" if part is None else value(part)


def rich_table(result: CompareResult) -> Any:
    """The table for a terminal, as a rich renderable."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title(result), title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for p in result.potentials:
        table.add_column(p.name, justify="right", overflow="fold")
    table.add_column("", style="dim", no_wrap=True)
    for row in rows(result):
        table.add_row(row.label, *row.values, row.unit)
    return table


def title(result: CompareResult) -> str:
    """What was compared, in one line."""
    s = result.settings
    length = s.steps * s.timestep_fs / 1e3
    reference = method(result.reference) + levels(result)
    return f"{result.formula}, {s.temperature_K:g} K, {length:g} ps each, against {reference}"


def levels(result: CompareResult) -> str:
    """What follows the reference's name if it is another level of theory than that of the training; else nothing."""
    told = [f"{name} was trained on {method(level)}" for name, level in result.other_levels.items()]
    return f" (another level of theory: {', '.join(told)})" if told else ""


def method(reference: str) -> str:
    """A reference as it is written in papers."""
    return METHODS.get(reference, reference)


def _mae(errors: Errors | None) -> str:
    return "–" if errors is None else number(1e3 * errors.mae)


def _force_rmse(accuracy: AccuracyResult) -> str:
    return number(1e3 * accuracy.force.rmse) if accuracy.force else "–"


def _stress_mae(accuracy: AccuracyResult) -> str:
    return _both_units(accuracy.stress.mae) if accuracy.stress else "–"


def _both_units(stress: float) -> str:
    """A stress in meV/Å³, and in GPa."""
    return f"{number(1e3 * stress)} ({number(stress / GPA, 2)})"


def _part(root: float | None, stderr: float) -> str:
    return "–" if root is None else with_error(1e3 * root, 1e3 * stderr)


def _proper(equivariance: EquivarianceResult) -> str:
    return _part(equivariance.force.proper, equivariance.force.proper_stderr)


def _inversion(equivariance: EquivarianceResult) -> str:
    return _part(equivariance.force.inversion, equivariance.force.inversion_stderr)


def _floor(equivariance: EquivarianceResult) -> str:
    force = equivariance.force
    note = " (estimated)" if force.floor_kind == "estimated" else ""
    return number(None if force.floor is None else 1e3 * force.floor, 2) + note


def _stress(equivariance: EquivarianceResult, field: str) -> str:
    stress = equivariance.stress
    return "–" if stress is None else _both_units(getattr(stress, field))


def _equivariance(equivariance: EquivarianceResult) -> str:
    return with_error(1e3 * equivariance.force.rmse_equiv, 1e3 * equivariance.force.stderr)


def _worst(equivariance: EquivarianceResult) -> str:
    worst = equivariance.force.worst_atom
    return f"{number(1e3 * worst.rmse_equiv)} ({worst.element}{worst.index})"


def _percent(equivariance: EquivarianceResult) -> str:
    loss = equivariance.loss
    return "–" if loss is None else with_error(loss.percent_of_loss, loss.stderr)


def _bonds(stability: StabilityResult) -> str:
    return "–" if stability.first_broken_ps is None else f"change at {number(stability.first_broken_ps)} ps"


def _step(throughput: ThroughputResult) -> str:
    note = " (unstable)" if throughput.unstable else ""
    return number(throughput.ms_per_step.median) + note


# Label, unit, the part of a PotentialResult that is needed, and its text.
_TABLE: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("Bonds of the start", "", "stability", _bonds),
    ("Force error (MAE)", "meV/Å", "accuracy", lambda a: _mae(a.force)),
    ("Force error (RMSE)", "meV/Å", "accuracy", _force_rmse),
    ("Energy error (MAE)", "meV/atom", "accuracy", lambda a: _mae(a.energy_per_atom)),
    ("Stress error (MAE)", "meV/Å³ (GPa)", "accuracy", _stress_mae),
    ("Equivariance error", "meV/Å", "equivariance", _equivariance),
    ("  rotations alone", "meV/Å", "equivariance", _proper),
    ("  from inversion", "meV/Å", "equivariance", _inversion),
    ("  rounding floor", "meV/Å", "equivariance", _floor),
    ("  of the RMS force", "", "equivariance", lambda e: number(e.force.relative)),
    ("  worst atom", "meV/Å", "equivariance", _worst),
    ("  energy spread", "meV/atom", "equivariance", lambda e: number(1e3 * e.energy.std_per_atom)),
    ("  stress spread", "meV/Å³ (GPa)", "equivariance", lambda e: _stress(e, "rmse_equiv")),
    ("  stress asymmetry", "meV/Å³ (GPa)", "equivariance", lambda e: _stress(e, "antisymmetric")),
    ("Share of the loss", "%", "equivariance", _percent),
    ("Symmetry error is", "", "verdict", lambda v: WORDS[v.level].split(":")[0]),
    ("NVE energy drift", "meV/atom/ps", "nve", lambda d: with_error(d.drift_mev_per_atom_per_ps, d.stderr)),
    ("Speed", "ns/day", "throughput", lambda t: number(t.ns_per_day)),
    ("  one MD step", "ms", "throughput", _step),
    ("  per device-hour", "ns", "throughput", lambda t: number(t.ns_per_device_hour)),
    ("Frames without labels", "", "n_failed", lambda n: f"{n}" if n else "–"),
    ("Parameters", "", "n_parameters", lambda n: f"{n:,}"),
    ("Training", "device-hours", "training_device_hours", lambda hours: number(hours, 2)),
)
