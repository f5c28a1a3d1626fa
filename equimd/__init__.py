"""equimd: do I need an equivariant potential? Train both kinds, run MD, and measure the answer.

The names below are the public face; each is imported on first use, so that ``import equimd`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    # potentials
    "EquimdCalculator": "equimd.calculators.ase",
    "find_potential": "equimd.models.checkpoint",
    "list_potentials": "equimd.models.checkpoint",
    "load_potential": "equimd.models.checkpoint",
    # the main jobs, and what they are told
    "compare": "equimd.comparison",
    "CompareSettings": "equimd.report.comparison",
    "check": "equimd.analysis.check",
    "equivariance_error": "equimd.analysis.equivariance",
    "evaluate_accuracy": "equimd.analysis.accuracy",
    "load_recipe": "equimd.training",
    "make_recipe": "equimd.training",
    "MDSettings": "equimd.md.settings",
    "measure_throughput": "equimd.analysis.throughput",
    "run_md": "equimd.md",
    "TimingSettings": "equimd.analysis.throughput",
    "train": "equimd.training",
    # frames
    "read_frames": "equimd.frames",
    "read_list": "equimd.frames",
    "write_frames": "equimd.frames",
    # what bad input raises
    "InputError": "equimd.errors",
}

__all__ = [
    "CompareSettings",
    "EquimdCalculator",
    "InputError",
    "MDSettings",
    "TimingSettings",
    "__version__",
    "check",
    "compare",
    "equivariance_error",
    "evaluate_accuracy",
    "find_potential",
    "list_potentials",
    "load_potential",
    "load_recipe",
    "make_recipe",
    "measure_throughput",
    "read_frames",
    "read_list",
    "run_md",
    "train",
    "write_frames",
]

if TYPE_CHECKING:
    from equimd.analysis.accuracy import evaluate_accuracy
    from equimd.analysis.check import check
    from equimd.analysis.equivariance import equivariance_error
    from equimd.analysis.throughput import TimingSettings, measure_throughput
    from equimd.calculators.ase import EquimdCalculator
    from equimd.comparison import compare
    from equimd.errors import InputError
    from equimd.frames import read_frames, read_list, write_frames
    from equimd.md import run_md
    from equimd.md.settings import MDSettings
    from equimd.models.checkpoint import find_potential, list_potentials, load_potential
    from equimd.report.comparison import CompareSettings
    from equimd.training import load_recipe, make_recipe, train


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'equimd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
