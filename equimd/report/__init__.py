"""Plots and the one-file HTML report of a comparison; the only room that draws.

``comparison`` is the result that is shown, ``verdict`` its words, ``table`` its rows, ``figures`` its plots, ``page``
the HTML around them.
"""

from pathlib import Path

from equimd.report.comparison import REPORT_FILE, RESULTS_FILE, CompareResult, load_results
from equimd.report.page import render
from equimd.results import write_text_atomically

__all__ = ["REPORT_FILE", "RESULTS_FILE", "CompareResult", "load_results", "write_report"]


def write_report(result: CompareResult, folder: str | Path) -> Path:
    """Write ``report.html``, one self-contained page, into the folder, which must exist; return its path."""
    path = Path(folder) / REPORT_FILE
    write_text_atomically(path, render(result))
    return path
