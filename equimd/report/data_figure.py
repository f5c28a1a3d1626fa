"""The figure of ``equimd data inspect``: four questions about files of frames, on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from equimd.errors import FailedError, InputError
from equimd.report.style import INK, MUTED, colour, house_style, line
from equimd.report.survey import FORCE_BINS, N_DISTANCE_BINS, Survey

_POINTS = 200  # places along a file at most, each with the range of the frames there
_SINGLY = 600  # frames up to which each is a point
_PAIRS = 6
_NAMED = 3
ACCEPTED = (".png", ".svg", ".pdf")


def check_figure(path: Path) -> None:
    """Refuse, before the work starts, a name that no figure can have."""
    if path.suffix.lower() not in ACCEPTED:
        raise InputError(f"the figure is {path}; accepted are names that end in {', '.join(ACCEPTED)}")
    if not path.parent.is_dir():
        raise InputError(f"the figure is {path}, but there is no folder {path.parent}; accepted is an existing one")


def write_figure(path: Path, names: Sequence[str], surveys: Sequence[Survey]) -> None:
    """Draw the surveys of files and save the figure, in the format that its name says.

    Raises:
        FailedError: where it cannot be written.
    """
    with house_style():
        figure = draw(names, surveys)
        temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
        try:
            figure.savefig(temporary, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
            temporary.replace(path)
        except OSError as error:
            raise FailedError(f"cannot write {path}: {error.strerror or error}; draw it elsewhere") from error
        finally:
            temporary.unlink(missing_ok=True)


def draw(names: Sequence[str], surveys: Sequence[Survey]) -> Any:
    """Forces along the file, forces, energies and distances; one file by element, several by file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 6.0), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # pyright: ignore
    axes = figure.subplots(2, 2)
    _forces_along_the_file(axes[0, 0], surveys)
    _force_distribution(axes[0, 1], surveys)
    _energy_distribution(axes[1, 0], surveys)
    _distance_distribution(axes[1, 1], surveys)
    for one in axes.flat:
        one.title.set_fontsize(10)
        one.title.set_color(INK)
    if len(surveys) > 1:
        handles = [axes[0, 0].plot([], [], line(k), color=colour(k), linewidth=2)[0] for k in range(len(surveys))]
        figure.legend(handles, _legend(names, surveys), loc="outside upper left", ncols=3, handlelength=2.2)
    else:
        figure.suptitle(_legend(names, surveys)[0], x=0.01, ha="left", fontsize=10, color=MUTED)
    return figure


def _legend(names: Sequence[str], surveys: Sequence[Survey]) -> list[str]:
    return [f"{name}: {len(survey.arrays):,} frames" for name, survey in zip(names, surveys, strict=True)]


def _forces_along_the_file(axes: Any, surveys: Sequence[Survey]) -> None:
    """The largest force of every frame, in its place in the file; of many frames, their range and their median."""
    axes.set_title("Largest force of a frame", loc="left")
    axes.set_ylabel("force / eV Å⁻¹")
    axes.set_xlabel("frame" if len(surveys) == 1 else "place in the file / %")
    drawn = False
    for k, survey in enumerate(surveys):
        known = np.isfinite(survey.largest_force) & (survey.largest_force > 0)
        if not known.any():
            continue
        drawn = True
        place = np.asarray(survey.arrays["index"])[known].astype(float)
        if len(surveys) > 1:
            place *= 100.0 / max(place.max(), 1.0)
        values = survey.largest_force[known]
        if len(values) <= _SINGLY and len(surveys) == 1:
            axes.plot(place, values, ".", color=colour(k), markersize=3, alpha=0.7)
        else:
            most = _POINTS // 4 if len(surveys) > 1 else _POINTS
            parts = np.array_split(np.arange(len(values)), max(1, min(most, len(values) // 8)))
            x = np.array([place[part].mean() for part in parts])
            low, middle, high = np.array([np.percentile(values[part], (0, 50, 100)) for part in parts]).T
            axes.fill_between(x, low, high, color=colour(k), alpha=0.2, linewidth=0)
            axes.plot(x, middle, line(k), color=colour(k), linewidth=1.2)
            note = "line: median, shade: all frames"
            axes.text(0.02, 0.03, note, transform=axes.transAxes, fontsize=8, color=MUTED)
        if len(surveys) == 1:
            _name_outliers(axes, survey)
    axes.set_yscale("log")
    axes.margins(y=0.12)
    _plain_log(axes, "y")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if not drawn:
        _nothing(axes, "no forces")


def _name_outliers(axes: Any, survey: Survey) -> None:
    """Circles around the frames with the most extraordinary forces, and their numbers."""
    odd = [outlier for outlier in survey.outliers() if outlier.what == "largest force"]
    for outlier in odd:
        axes.plot(outlier.frame, outlier.value, "o", color=colour(1), markerfacecolor="none", markersize=5)
    middle = len(survey.arrays) / 2
    for outlier in odd[:_NAMED]:
        right = outlier.frame > middle
        axes.annotate(
            f"{outlier.frame:,}",
            (outlier.frame, outlier.value),
            xytext=(-6 if right else 6, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=8,
            color=colour(1),
        )


def _force_distribution(axes: Any, surveys: Sequence[Survey]) -> None:
    axes.set_title("Force on an atom", loc="left")
    axes.set_xlabel("force / eV Å⁻¹")
    width = np.log10(FORCE_BINS[1] / FORCE_BINS[0])
    rows: list[tuple[str | None, Any]] = [
        (chemical_symbols[z] if len(surveys) == 1 else None, counts)
        for survey in surveys
        for z, counts in (survey.forces.items() if len(surveys) == 1 else [(0, sum(survey.forces.values(), start=0.0))])
    ]
    drawn = False
    for k, (label, counts) in enumerate(rows):
        total = float(np.sum(counts))
        if total:
            drawn = True
            axes.stairs(
                10.0 * counts / (total * width),
                FORCE_BINS,
                color=colour(k),
                linestyle=line(k),
                linewidth=1.4,
                label=label,
            )
    if not drawn:
        _nothing(axes, "no forces")
        return
    axes.set_xscale("log")
    filled = FORCE_BINS[:-1][np.sum([counts for _, counts in rows], axis=0) > 0]
    axes.set_xlim(max(filled.min(), filled.max() * 1e-4) / 1.3, filled.max() * 1.6)
    _plain_log(axes, "x")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("atoms per tenth of a decade / %")
    if len(surveys) == 1:
        axes.legend(handlelength=1.8)


def _energy_distribution(axes: Any, surveys: Sequence[Survey]) -> None:
    axes.set_title("Energy beyond fitted atomic energies", loc="left")
    axes.set_xlabel("energy / meV per atom")
    axes.set_ylabel("frames / %")
    known = [1000.0 * survey.energy[np.isfinite(survey.energy)] for survey in surveys]
    if not sum(map(len, known)):
        _nothing(axes, "no energies")
        return
    joined = np.concatenate(known)
    low, high = np.percentile(joined, (0.05, 99.95)) if len(joined) > 1000 else (joined.min(), joined.max())
    margin = 0.08 * (high - low) or 1.0
    n_bins = int(np.clip(2.0 * np.sqrt(min(len(values) for values in known if len(values))), 15, 60))
    bins = np.linspace(low - margin, high + margin, n_bins + 1)
    for k, values in enumerate(known):
        if len(values):
            counts = 100.0 * np.histogram(values, bins)[0] / len(values)
            axes.stairs(counts, bins, color=colour(k), linestyle=line(k), linewidth=1.4, fill=len(surveys) == 1)
    outside = int(((joined < bins[0]) | (joined > bins[-1])).sum())
    if outside:
        axes.text(
            0.98, 0.95, f"{outside:,} outside", transform=axes.transAxes, ha="right", va="top", color=MUTED, fontsize=8
        )
    axes.set_ylim(bottom=0)


def _distance_distribution(axes: Any, surveys: Sequence[Survey]) -> None:
    cutoff = surveys[0].arrays.meta["cutoff"]
    axes.set_title(f"Distances up to {cutoff:g} Å", loc="left")
    axes.set_xlabel("distance / Å")
    axes.set_ylabel("neighbours of an atom per Å")
    rows: list[tuple[str | None, np.ndarray]] = []
    for survey in surveys:
        n_atoms = int(survey.arrays.atom_start[-1])
        if len(surveys) > 1:
            rows.append((None, np.sum(list(survey.distances.values()), axis=0) / n_atoms))
            continue
        pairs = sorted(survey.distances.items(), key=lambda item: -float(np.sum(item[1])))
        for (a, b), counts in pairs[: _PAIRS if len(pairs) <= _PAIRS else _PAIRS - 1]:
            rows.append((f"{chemical_symbols[a]}–{chemical_symbols[b]}", counts / n_atoms))
        if len(pairs) > _PAIRS:
            rows.append(("others", np.sum([counts for _, counts in pairs[_PAIRS - 1 :]], axis=0) / n_atoms))
    bins = np.linspace(0.0, cutoff, N_DISTANCE_BINS + 1)
    for k, (label, counts) in enumerate(rows):
        if np.ndim(counts):
            axes.stairs(counts / bins[1], bins, color=colour(k), linestyle=line(k), linewidth=1.4, label=label)
    if not any(np.ndim(counts) for _, counts in rows):
        _nothing(axes, "no neighbours")
        return
    axes.set_xlim(0.0, cutoff)
    axes.set_ylim(bottom=0)
    if len(surveys) == 1:
        axes.legend(handlelength=1.8)


def _plain_log(axes: Any, axis: str) -> None:
    """Label a logarithmic axis with plain numbers, and with more of them where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = getattr(axes, f"get_{axis}lim")()
    ticks = getattr(axes, f"{axis}axis")
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _nothing(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])
