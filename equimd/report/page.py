"""One self-contained HTML page: style and figures inline, nothing fetched."""

from html import escape
from importlib import resources

from equimd.report.comparison import CompareResult, PotentialResult
from equimd.report.figures import Plot, draw_all
from equimd.report.style import colour
from equimd.report.table import levels, method, rows
from equimd.report.verdict import NEGLIGIBLE, VISIBLE, WORDS, in_words


def render(result: CompareResult) -> str:
    """The whole page as text."""
    style = resources.files("equimd.report").joinpath("page.css").read_text(encoding="utf-8")
    names = " and ".join(p.name for p in result.potentials)
    body = "\n".join(
        (
            _header(result),
            _verdict(result),
            _table(result),
            _figures(draw_all(result), levels(result)),
            _methods(result),
            _footer(result),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)} · equimd</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(result: CompareResult) -> str:
    s = result.settings
    names = ' <span class="vs">and</span> '.join(
        f'<span style="color:{colour(k)}">{escape(p.name)}</span>' for k, p in enumerate(result.potentials)
    )
    facts = " · ".join(
        (
            f"{_formula(result.formula)}, {result.n_atoms} atoms",
            f"{s.temperature_K:g} K",
            f"{s.steps * s.timestep_fs / 1e3:g} ps of molecular dynamics each",
            f"labelled with {escape(method(result.reference) + levels(result))}",
        )
    )
    return f'<header>\n<p class="kicker">equimd compare</p>\n<h1>{names}</h1>\n<p class="facts">{facts}</p>\n</header>'


def _formula(formula: str) -> str:
    """Digits as subscripts."""
    out = ""
    for character in escape(formula):
        out += f"<sub>{character}</sub>" if character.isdigit() else character
    return out.replace("</sub><sub>", "")


def _verdict(result: CompareResult) -> str:
    cards = "\n".join(_card(p, colour(k)) for k, p in enumerate(result.potentials))
    own = [p.verdict.text for p in result.potentials if p.verdict is not None]
    own += [p.stopped.in_words() for p in result.potentials if p.stopped is not None]
    lines = "\n".join(f"<li>{escape(line)}</li>" for line in in_words(result.potentials) if not _repeats(line, own))
    return (
        '<section class="verdict">\n<h2>Is the symmetry error worth worrying about?</h2>\n'
        f'<div class="cards">\n{cards}\n</div>\n<ul>\n{lines}\n</ul>\n</section>'
    )


def _card(p: PotentialResult, shade: str) -> str:
    """Name, verdict and reason; what a potential did not survive comes before its symmetry."""
    level = "not known" if p.verdict is None else WORDS[p.verdict.level].split(":")[0]
    because = [] if p.verdict is None else [p.verdict.text]
    if p.stopped is not None:
        level, because = p.stopped.briefly(), [p.stopped.in_words(), *because]
    reasons = "\n".join(f'<p class="because">{escape(text)}</p>' for text in because)
    return (
        f'<div class="card" style="border-top-color:{shade}">\n<p class="name">{escape(p.name)}</p>\n'
        f'<p class="level">{escape(level)}</p>\n{reasons}\n</div>'
    )


def _repeats(line: str, texts: list[str]) -> bool:
    return any(line.endswith(f"{text}.") for text in texts)


def _table(result: CompareResult) -> str:
    head = "".join(
        f'<th scope="col" style="--whose:{colour(k)}"><span class="dot" style="background:{colour(k)}"></span>'
        f"{escape(p.name)}</th>"
        for k, p in enumerate(result.potentials)
    )
    lines = []
    for row in rows(result):
        kind = ' class="sub"' if row.label.startswith(" ") else ""
        cells = "".join(
            f'<td class="value" style="--whose:{colour(k)}">{escape(value)}</td>' for k, value in enumerate(row.values)
        )
        unit = f'<td class="unit">{escape(row.unit)}</td>'
        lines.append(f'<tr{kind}><th scope="row">{escape(row.label.strip())}</th>{cells}{unit}</tr>')
    body = "\n".join(lines)
    return (
        f'<section>\n<h2>Side by side{escape(levels(result))}</h2>\n<div class="scroll"><table class="side">\n'
        f"<thead><tr><td></td>{head}<td></td></tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n</section>"
    )


def _figures(plots: list[Plot], note: str) -> str:
    figures = "\n".join(
        f"<figure>\n<h3>{escape(p.title)}</h3>\n{p.svg}\n<figcaption>{escape(p.caption + note)}</figcaption>\n</figure>"
        for p in plots
    )
    return f'<section class="plots">\n{figures}\n</section>'


def _methods(result: CompareResult) -> str:
    s = result.settings
    items = [
        f"Langevin dynamics at {s.temperature_K:g} K, friction {s.friction_per_fs:g} fs⁻¹, time step {s.timestep_fs:g} "
        f"fs, {s.steps:,} steps, seed {s.seed}; all potentials start from the same positions and velocities.",
        *_accuracy_method(result),
        *_equivariance_method(result),
        *_dynamics_method(result),
        *_degree_check(result),
    ]
    lines = "\n".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<section class="methods">\n<h2>How it was measured</h2>\n<ul>\n{lines}\n</ul>\n</section>'


def _accuracy_method(result: CompareResult) -> list[str]:
    accuracy = next((p.accuracy for p in result.potentials if p.accuracy is not None), None)
    if accuracy is None:
        return ["No frame was labelled, so errors are not known."]
    stopped = [p.name for p in result.potentials if p.stopped is not None and p.stopped.ensemble == "nvt"]
    if len(stopped) == len(result.potentials):
        stopped = []  # no run is whole: all are pooled
    note = f" Frames of {' and '.join(stopped)}, whose run is not whole, are not among them." if stopped else ""
    return [
        f"Up to {result.settings.frames} evenly spaced frames of each run are labelled with "
        f"{method(result.reference)}. Accuracy is over the {accuracy.n_frames} labelled frames of all runs, "
        f"so that every potential meets the same structures, equivariance on the frames of its own run.{note}"
    ]


def _equivariance_method(result: CompareResult) -> list[str]:
    measured = next((p.equivariance for p in result.potentials if p.equivariance is not None), None)
    if measured is None:
        return ["No run has a frame beyond its start, so symmetry errors are not known."]
    group = measured.group
    space = "O(3)" if group.inversion else "SO(3)"
    kind = f"quadrature of degree {group.degree}" if group.kind == "quadrature" else "random rotations"
    return [
        f"Equivariance error: forces of {group.n_rotations} rotated copies of each frame ({kind} on {space}), rotated "
        "back; their spread about the mean. The mean squared error splits exactly into the error of that mean and "
        "this spread: the share of the loss.",
        *_parts_and_floor(result),
        f"Verdict: below three rounding floors exact; below {NEGLIGIBLE:g} of the force error negligible here; up to "
        f"{VISIBLE:g} visible; above, dominant.",
    ]


def _dynamics_method(result: CompareResult) -> list[str]:
    drift = next((p.nve for p in result.potentials if p.nve is not None), None)
    speed = next((p.throughput for p in result.potentials if p.throughput is not None), None)
    items = []
    if drift is not None:
        items.append(
            f"NVE: {drift.duration_ps:g} ps from the end of the Langevin run; drift by least squares, with a standard "
            "error that respects autocorrelation but cannot know of changes slower than the run."
        )
    if speed is not None:
        items.append(
            f"Speed: median over blocks of MD steps after a warm-up; a device-hour is one hour of {speed.device}."
        )
    return items


def _degree_check(result: CompareResult) -> list[str]:
    checks = [
        (p.name, check)
        for p in result.potentials
        if p.equivariance is not None
        and (check := p.equivariance.degree_check) is not None
        and p.verdict is not None
        and p.verdict.level != "exact"
    ]
    if not checks:
        return []
    changes = ", ".join(f"{100 * check.relative_change:+.2g} % ({name})" for name, check in checks)
    return [f"Raising the quadrature to degree {checks[0][1].degree} changes the equivariance error by {changes}."]


def _parts_and_floor(result: CompareResult) -> list[str]:
    """How the symmetry error is split over O(3), and where the floors come from; of those that have one."""
    items = []
    measured = [p.equivariance for p in result.potentials if p.equivariance is not None]
    if measured[0].group.inversion:
        items.append(
            "Rotations alone: the spread over SO(3), of each frame and of its mirror image. From inversion: half the "
            "difference between the means of the two. Their squares add up to that of the equivariance error."
        )
    kinds = {equivariance.force.floor_kind for equivariance in measured}
    if "measured" in kinds:
        items.append("Rounding floor: the difference between forces in float32 and in float64, rotations as above.")
    if "estimated" in kinds:
        items.append(
            "Rounding floor (estimated): what is left of sixth differences of the forces along a line of 2·10⁻⁵ Å, "
            "where everything that is smooth cancels, broken symmetry included."
        )
    return items


def _footer(result: CompareResult) -> str:
    p = result.provenance
    versions = " · ".join(f"{name} {version}" for name, version in p.versions.items() if version != "not installed")
    timed = [q.throughput for q in result.potentials if q.throughput is not None]
    devices = sorted({f"{throughput.device}, {throughput.dtype}" for throughput in timed})
    machine = "; ".join((f"{p.processor}, threads: {p.n_threads}", *devices, f"{result.wall_seconds:.0f} s in all"))
    return (
        f"<footer>\n<p>{escape(p.date)} · {escape(machine)}</p>\n"
        f"<p>python {escape(p.python)} · {escape(versions)}</p>\n"
        "<p>Every number and series is in results.json beside this page.</p>\n</footer>"
    )
