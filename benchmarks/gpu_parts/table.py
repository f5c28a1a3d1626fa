"""What was measured, as text: a few lines for each part, in Markdown."""

from typing import Any

COLUMNS = {
    "ms": ("ms", "{:.4g}"),
    "spread": ("spread", "{:.0%}"),
    "ms_per_evaluation": ("ms an evaluation", "{:.4g}"),
    "atom_steps_per_s": ("atoms x steps/s", "{:.3g}"),
    "frames_per_s": ("frames/s", "{:.4g}"),
    "gb_per_s": ("GB/s", "{:.4g}"),
    "gflop_per_s": ("GFLOP/s", "{:.4g}"),
    "tflop_per_s": ("TFLOP/s", "{:.4g}"),
    "peak_memory_mib": ("peak MiB", "{:.0f}"),
    "relative_force_error": ("force error", "{:.1e}"),
}
"""Figures that are shown, with their headings and formats; the JSON has all."""


def table(results: dict[str, Any]) -> str:
    """The whole report."""
    made = results["provenance"]
    machine = _of(results["parts"].get("environment", {}), "machine")
    device = machine.get("device", f"{results['device']}, {made['processor']}")
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("equimd", "torch", "triton"))
    about = f"{versions}, CUDA {machine.get('cuda', 'unknown')}, driver {machine.get('driver', 'unknown')}"
    lines = [f"# {device}", "", f"{made['date']}; {about}; {results['seconds']:.0f} s of {results['limit_s']:.0f} s."]
    if results["quick"]:
        lines += ["", "Tiny sizes, to see that it runs: no figure here tells anything of speed."]
    for name, part in results["parts"].items():
        lines += ["", f"## {name}: {part['state']}, {part['seconds']:.0f} s", ""]
        lines += [part["error"]] if "error" in part else []
        lines += {"correctness": _correctness, "peers": _contests, "profile": _profiles}.get(name, _figures)(part)
        lines += _left_out(part)
    return "\n".join(lines)


def _of(part: dict[str, Any], what: str) -> dict[str, Any]:
    return next((case for case in part.get("cases", []) if case.get("what") == what), {})


def label(case: dict[str, Any]) -> str:
    """The values that name a case, which are those before its state."""
    names = list(case)[: list(case).index("state")]
    return ", ".join(f"{case[name]} {name}" if isinstance(case[name], int) else str(case[name]) for name in names)


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] if rows else []


def _figures(part: dict[str, Any]) -> list[str]:
    """A line for each case that was measured, with the columns that any of them has."""
    done = [case for case in part["cases"] if case["state"] == "done" and case.get("ms") is not None]
    columns = [key for key in COLUMNS if any(key in case for case in done)]
    rows = [
        [label(case), *(COLUMNS[key][1].format(case[key]) if key in case else "" for key in columns)] for case in done
    ]
    return _rows(["case", *(COLUMNS[key][0] for key in columns)], rows)


def _correctness(part: dict[str, Any]) -> list[str]:
    """The largest deviation of each kind of check, and how many passed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in part["cases"]:
        if "passed" in case:
            groups.setdefault(", ".join(str(case[k]) for k in ("check", "dtype", "backend") if k in case), []).append(
                case
            )
    rows = []
    for name, found in groups.items():
        known = ("check", "of", "dtype", "backend", "state", "seconds", "bound", "passed", "error")
        kinds = dict.fromkeys(key for case in found for key in case if key not in known)
        worst = {
            kind: max((case[kind] for case in found if case.get(kind) is not None), default=None) for kind in kinds
        }
        largest = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items() if value is not None)
        bound = f"{found[0]['bound']:.0e}" if "bound" in found[0] else ""
        rows.append([name, f"{sum(case['passed'] for case in found)} of {len(found)}", largest, bound])
    return _rows(["check", "passed", "largest relative deviations", "bound"], rows)


def _contests(part: dict[str, Any]) -> list[str]:
    """A line for each contestant."""
    rows = []
    for case in part["cases"]:
        for name, result in case.get("contestants", {}).items():
            ms = f"{result['ms']:.4g}" if "ms" in result else f"does not run: {result['error'][:80]}"
            rows.append([case["row"], name, ms, f"{result['ratio']:.2f}" if "ratio" in result else ""])
    return _rows(["work", "potential", "ms", "times equimd"], rows)


def _profiles(part: dict[str, Any]) -> list[str]:
    """A line for each case, with what takes longest."""
    lines = []
    for case in part["cases"]:
        if case["state"] == "done":
            longest = [f"{name} {ms:.3g}" for name, ms in list(case["longest"].items())[:6]]
            lines.append(f"- {label(case)}, ms: {', '.join(longest)}")
    return lines


def _left_out(part: dict[str, Any]) -> list[str]:
    """What failed, with its error; what was skipped or not reached, by number."""
    lines = [
        f"- {case['state']}: {label(case)}: {case['error'][:160]}"
        for case in part["cases"]
        if case["state"] in ("failed", "stopped") and "error" in case
    ]
    for state in ("skipped", "not reached"):
        names = [label(case) for case in part["cases"] if case["state"] == state]
        if names:
            lines.append(f"- {state}: {len(names)} ({'; '.join(names[:3])}{'; ...' * (len(names) > 3)})")
    return ["", *lines] if lines else []
