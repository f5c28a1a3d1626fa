"""The one clear table: its rows as text, for the terminal (rich) and for the page."""

from typing import Any, NamedTuple

from equimd.references import METHODS
from equimd.report.comparison import CompareResult, PotentialResult
from equimd.report.numbers import number, with_error
from equimd.report.verdict import WORDS
from equimd.units import GPA


class Row(NamedTuple):
    """A line of the table: what it is, its unit, one text per potential."""

    label: str
    unit: str
    values: list[str]


def rows(result: CompareResult) -> list[Row]:
    """The table of a comparison, from accuracy to cost."""
    table = [
        ("Force error (MAE)", "meV/Å", _force_mae),
        ("Force error (RMSE)", "meV/Å", _force_rmse),
        ("Energy error (MAE)", "meV/atom", _energy_mae),
        ("Stress error (MAE)", "meV/Å³ (GPa)", _stress_mae),
        ("Equivariance error", "meV/Å", _equivariance),
        ("  rotations alone", "meV/Å", _proper),
        ("  from inversion", "meV/Å", _inversion),
        ("  rounding floor", "meV/Å", _floor),
        ("  of the RMS force", "", lambda p: number(p.equivariance.force.relative)),
        ("  worst atom", "meV/Å", _worst),
        ("  energy spread", "meV/atom", lambda p: number(1e3 * p.equivariance.energy.std_per_atom)),
        ("  stress spread", "meV/Å³ (GPa)", lambda p: _stress(p, "rmse_equiv")),
        ("  stress asymmetry", "meV/Å³ (GPa)", lambda p: _stress(p, "antisymmetric")),
        ("Share of the loss", "%", _percent),
        ("Symmetry error is", "", lambda p: WORDS[p.verdict.level].split(":")[0]),
        ("NVE energy drift", "meV/atom/ps", _drift),
        ("Speed", "ns/day", lambda p: number(p.throughput.ns_per_day)),
        ("  one MD step", "ms", _step),
        ("  per device-hour", "ns", lambda p: number(p.throughput.ns_per_device_hour)),
        ("Parameters", "", lambda p: "–" if p.n_parameters is None else f"{p.n_parameters:,}"),
        ("Training", "device-hours", _training),
    ]
    out = [Row(label, unit, [value(p) for p in result.potentials]) for label, unit, value in table]
    return [row for row in out if any(value != "–" for value in row.values)]


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


def _force_mae(p: PotentialResult) -> str:
    return number(1e3 * p.accuracy.force.mae) if p.accuracy.force else "–"


def _force_rmse(p: PotentialResult) -> str:
    return number(1e3 * p.accuracy.force.rmse) if p.accuracy.force else "–"


def _energy_mae(p: PotentialResult) -> str:
    return number(1e3 * p.accuracy.energy_per_atom.mae) if p.accuracy.energy_per_atom else "–"


def _stress_mae(p: PotentialResult) -> str:
    return _both_units(p.accuracy.stress.mae) if p.accuracy.stress else "–"


def _both_units(stress: float) -> str:
    """A stress in meV/Å³, and in GPa."""
    return f"{number(1e3 * stress)} ({number(stress / GPA, 2)})"


def _part(root: float | None, stderr: float) -> str:
    return "–" if root is None else with_error(1e3 * root, 1e3 * stderr)


def _proper(p: PotentialResult) -> str:
    return _part(p.equivariance.force.proper, p.equivariance.force.proper_stderr)


def _inversion(p: PotentialResult) -> str:
    return _part(p.equivariance.force.inversion, p.equivariance.force.inversion_stderr)


def _floor(p: PotentialResult) -> str:
    force = p.equivariance.force
    note = " (estimated)" if force.floor_kind == "estimated" else ""
    return number(None if force.floor is None else 1e3 * force.floor, 2) + note


def _stress(p: PotentialResult, field: str) -> str:
    stress = p.equivariance.stress
    return "–" if stress is None else _both_units(getattr(stress, field))


def _equivariance(p: PotentialResult) -> str:
    force = p.equivariance.force
    return with_error(1e3 * force.rmse_equiv, 1e3 * force.stderr)


def _worst(p: PotentialResult) -> str:
    worst = p.equivariance.force.worst_atom
    return f"{number(1e3 * worst.rmse_equiv)} ({worst.element}{worst.index})"


def _percent(p: PotentialResult) -> str:
    loss = p.equivariance.loss
    return "–" if loss is None else with_error(loss.percent_of_loss, loss.stderr)


def _drift(p: PotentialResult) -> str:
    return with_error(p.nve.drift_mev_per_atom_per_ps, p.nve.stderr)


def _step(p: PotentialResult) -> str:
    note = " (unstable)" if p.throughput.unstable else ""
    return number(p.throughput.ms_per_step.median) + note


def _training(p: PotentialResult) -> str:
    return number(p.training_device_hours, 2)
