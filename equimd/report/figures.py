"""The figures of a comparison, each as an inline SVG: one function, one question."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from equimd.report.comparison import CompareResult, Parity, PotentialResult
from equimd.report.style import GRID, INK, MUTED, colour, house_style, line, marker, new_axes, to_svg
from equimd.report.table import method
from equimd.report.verdict import NEGLIGIBLE, VISIBLE

_MEV = 1e3
# Letters of a name, and of a line of names, that fit above a figure.
_NAME, _LINE = 60, 72


class Plot(NamedTuple):
    """A figure on the page: title, one sentence that says how to read it, and the SVG."""

    title: str
    caption: str
    svg: str


def draw_all(result: CompareResult) -> list[Plot]:
    """Every figure of the report that has something to show, in reading order."""
    with house_style():
        plots = [
            _plot(
                result,
                error_against_time,
                "Equivariance error along the trajectory",
                "Spread of the forces over rotations of each frame, per component. "
                "The dotted line is the rounding floor.",
            ),
            _plot(
                result,
                percent_of_loss,
                "Share of the loss",
                "How much of the squared force error is broken symmetry. Shaded bands carry the verdict's words.",
            ),
            _plot(
                result,
                error_by_element,
                "Error by element",
                "Filled: force error on the common frames. Open: equivariance error on the potential's own run.",
            ),
            _plot(
                result,
                force_parity,
                "Force parity",
                f"Predicted against {method(result.reference)} forces on the common frames; below, the difference.",
            ),
            _plot(
                result,
                error_against_speed,
                "Accuracy against cost",
                "Right and down is better. The line joins what no other potential beats in both.",
            ),
            _plot(
                result,
                energy_conservation,
                "Energy conservation",
                "Total energy in NVE, per atom, from where it started; the straight line is the drift.",
            ),
        ]
    return [plot for plot in plots if plot is not None]


def _plot(result: CompareResult, draw: Callable[[CompareResult], Any], title: str, caption: str) -> Plot | None:
    if not any(_SHOWS[draw](p) for p in result.potentials):
        return None
    return Plot(title, caption, to_svg(draw(result), title))


def error_against_time(result: CompareResult) -> Any:
    """rmse_equiv of every frame in meV/Å against ps, logarithmic, with the floors."""
    figure, axes = new_axes()
    for k, p in enumerate(result.potentials):
        if not p.trajectory.times_fs:
            continue
        times = np.array(p.trajectory.times_fs) / 1e3
        values = _MEV * np.maximum(p.trajectory.rmse_equiv, 1e-17)
        axes.plot(times, values, line(k), color=colour(k), marker=marker(k), label=p.name)
        if p.equivariance is not None and p.equivariance.force.floor:
            axes.axhline(_MEV * p.equivariance.force.floor, color=colour(k), linewidth=0.9, linestyle=":")
    axes.set_yscale("log")
    _room_on_log(axes, "y", above=4.0)
    axes.set_xlabel("time / ps")
    axes.set_ylabel("equivariance error / meV Å⁻¹")
    _legend_above(axes)
    return figure


def percent_of_loss(result: CompareResult) -> Any:
    """Percent of loss of every frame against ps, logarithmic; exact potentials lie below the axis and say so."""
    figure, axes = new_axes()
    lows = [_positive(p.trajectory.percent_of_loss) for p in result.potentials]
    lowest = min((min(v) for v in lows if v), default=1e-2)
    bottom = max(10 ** math.floor(math.log10(lowest) - 0.3), 1e-13)
    for top, floor, shade, word in (
        (100.0 * NEGLIGIBLE**2, bottom, "#f5f7fa", "negligible"),
        (100.0 * VISIBLE**2, 100.0 * NEGLIGIBLE**2, "#eceff3", "visible"),
        (200.0, 100.0 * VISIBLE**2, "#dfe4ea", "dominant"),
    ):
        axes.axhspan(floor, top, color=shade, zorder=0, linewidth=0)
        middle = math.sqrt(floor * top) if word != "negligible" else top / 2.2
        axes.text(
            0.995,
            middle,
            word,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center" if word != "negligible" else "top",
            color=MUTED,
            fontsize=8,
        )
    for k, p in enumerate(result.potentials):
        if not _has_share(p):
            continue
        times = np.array(p.trajectory.times_fs) / 1e3
        values = [v if v and v > 0 else math.nan for v in p.trajectory.percent_of_loss]
        axes.plot(times, values, line(k), color=colour(k), marker=marker(k), label=p.name)
    axes.set_yscale("log")
    axes.set_ylim(bottom, 200.0)
    axes.grid(visible=False)
    axes.set_xlabel("time / ps")
    axes.set_ylabel("share of the loss / %")
    _legend_above(axes)
    return figure


def error_by_element(result: CompareResult) -> Any:
    """Force RMSE (filled) and equivariance error (open) of each element in meV/Å, logarithmic."""
    figure, axes = new_axes()
    errors = [_of_elements(p) for p in result.potentials]
    elements = sorted({element for pair in errors for part in pair for element in part})
    width = 0.5 / len(result.potentials)
    for k, (p, (force, equivariance)) in enumerate(zip(result.potentials, errors, strict=True)):
        for place, element in enumerate(elements):
            x = place + (k - (len(result.potentials) - 1) / 2) * width
            top = _MEV * force.get(element, math.nan)
            bottom = _MEV * max(equivariance.get(element, math.nan), 1e-17)
            axes.plot([x, x], [top, bottom], color=colour(k), linewidth=1.2, alpha=0.5)
            axes.plot([x], [top], marker(k), color=colour(k), markersize=7, label=None if place else p.name)
            axes.plot([x], [bottom], marker(k), color=colour(k), markersize=7, markerfacecolor="white")
    axes.set_yscale("log")
    _room_on_log(axes, "y", above=1.5, below=1.5)
    axes.set_xticks(np.arange(len(elements)), elements)
    axes.set_xlim(-0.6, len(elements) - 0.4)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("RMS per component / meV Å⁻¹")
    _legend_above(axes)
    return figure


def _of_elements(p: PotentialResult) -> tuple[dict[str, float], dict[str, float]]:
    """Force RMSE and equivariance error by element, eV/Å; empty if unknown."""
    force = {} if p.accuracy is None else {e: one.rmse for e, one in p.accuracy.force_per_element.items()}
    return force, {} if p.equivariance is None else p.equivariance.force.per_element


def force_parity(result: CompareResult) -> Any:
    """Force components against the reference, and residuals below, on equal scales for all potentials."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    shown = [(k, p) for k, p in enumerate(result.potentials) if p.parity.reference]
    n = len(shown)
    axes = figure.subplots(2, n, sharex=True, sharey="row", squeeze=False, height_ratios=(1.7, 1))
    width = _MEV * max(_robust_width(p.parity) for _, p in shown)
    limit = max(max(map(abs, p.parity.reference)) for _, p in shown) * 1.05
    for place, (k, p) in enumerate(shown):
        reference, predicted = np.array(p.parity.reference), np.array(p.parity.predicted)
        style = {"linestyle": "none", "marker": marker(k), "markersize": 1.8, "color": colour(k), "alpha": 0.45}
        style |= {"markeredgewidth": 0, "rasterized": True}
        axes[0, place].plot([-limit, limit], [-limit, limit], color=GRID, linewidth=1.2)
        axes[0, place].plot(reference, predicted, **style)
        axes[1, place].axhline(0, color=GRID, linewidth=1.2)
        axes[1, place].plot(reference, _MEV * (predicted - reference), **style)
        axes[0, place].set_title(_shortened(p.name, _NAME // n), fontsize=9, color=colour(k))
        axes[1, place].set_xlabel("reference / eV Å⁻¹")
        axes[0, place].set_xlim(-limit, limit)
        axes[0, place].set_ylim(-limit, limit)
        axes[1, place].set_ylim(-width, width)
    axes[0, 0].set_ylabel("predicted / eV Å⁻¹")
    axes[1, 0].set_ylabel("residual\nmeV Å⁻¹")
    return figure


def _robust_width(parity: Parity) -> float:
    """Half the height of a residual plot: all but the last half percent, with room."""
    residual = np.abs(np.array(parity.predicted) - np.array(parity.reference))
    return 1.3 * float(np.quantile(residual, 0.995)) if len(residual) and residual.any() else 1e-6


def error_against_speed(result: CompareResult) -> Any:
    """Force MAE on the common frames in meV/Å against ns per device-hour, Pareto front marked."""
    figure, axes = new_axes()
    points = []
    for k, p in enumerate(result.potentials):
        if p.throughput is None or p.accuracy is None or p.accuracy.force is None:
            continue
        x, y = p.throughput.ns_per_device_hour, _MEV * p.accuracy.force.mae
        points.append((x, y))
        axes.plot([x], [y], linestyle="none", marker=marker(k), markersize=9, color=colour(k), label=p.name)
        note = f"{p.throughput.ms_per_step.median:.3g} ms a step"
        axes.annotate(note, (x, y), xytext=(9, 0), textcoords="offset points", fontsize=8, color=MUTED, va="center")
    front = pareto_front(points)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in ("x", "y"):
        _room_on_log(axes, axis, above=2.0, below=2.0)
    axes.set_xlabel("speed / ns per device-hour")
    axes.set_ylabel("force error (MAE) / meV Å⁻¹")
    _legend_above(axes)
    return figure


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (speed, error) points that no other beats in both, from slow to fast."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front[::-1]


def energy_conservation(result: CompareResult) -> Any:
    """Total energy per atom in meV against ps, with the fitted drift."""
    figure, axes = new_axes()
    for k, p in enumerate(result.potentials):
        if not p.nve_energy.times_fs:
            continue
        times = np.array(p.nve_energy.times_fs) / 1e3
        values = np.array(p.nve_energy.mev_per_atom)
        axes.plot(times, values, line(k), color=colour(k), linewidth=0.8, alpha=0.65, label=p.name)
        if p.nve is None:  # the run stopped, so no line is fitted
            continue
        drift = p.nve.drift_mev_per_atom_per_ps
        axes.plot(times, values.mean() + drift * (times - times.mean()), color=colour(k), linewidth=1.8)
    axes.set_xlabel("time / ps")
    axes.set_ylabel("total energy − start / meV per atom")
    _legend_above(axes)
    return figure


def _has_share(p: PotentialResult) -> bool:
    return any(math.isfinite(value) for value in p.trajectory.percent_of_loss)


# Whether a figure has something to show of a potential.
_SHOWS: dict[Callable[[CompareResult], Any], Callable[[PotentialResult], bool]] = {
    error_against_time: lambda p: bool(p.trajectory.times_fs),
    percent_of_loss: _has_share,
    error_by_element: lambda p: any(_of_elements(p)),
    force_parity: lambda p: bool(p.parity.reference),
    error_against_speed: lambda p: p.throughput is not None and p.accuracy is not None and p.accuracy.force is not None,
    energy_conservation: lambda p: bool(p.nve_energy.times_fs),
}


def _positive(values: list[float]) -> list[float]:
    return [v for v in values if v is not None and v > 0]


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _legend_above(axes: Any) -> None:
    """A legend whose names share a line where they fit beside each other."""
    handles, labels = axes.get_legend_handles_labels()
    short = [_shortened(label, _NAME) for label in labels]
    columns = max(1, min(3, _LINE // (max(map(len, short), default=0) + 6)))
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.3, "handlelength": 2.2}
    axes.legend(handles, short, ncols=columns, **place)


def _room_on_log(axes: Any, axis: str, above: float = 1.0, below: float = 1.0) -> None:
    """Widen a logarithmic axis by factors, have at least one decade in view, and label short axes in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = getattr(axes, f"get_{axis}lim")()
    low, high = low / below, high * above
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = min(low, middle / 3.4), max(high, middle * 3.4)
    getattr(axes, f"set_{axis}lim")(low, high)
    if high / low < 1e3:
        ticks = getattr(axes, f"{axis}axis")
        ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())
