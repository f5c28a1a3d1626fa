"""equimd: do I need an equivariant potential? Train both kinds, run MD, and measure the answer.

The names below are the public face; each is imported on first use, so that ``import equimd`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_potential": "equimd.models.checkpoint",
    "EquimdCalculator": "equimd.calculators.ase",
    "equivariance_error": "equimd.analysis.equivariance",
    "measure_throughput": "equimd.analysis.throughput",
}

__all__ = ["EquimdCalculator", "__version__", "equivariance_error", "load_potential", "measure_throughput"]

if TYPE_CHECKING:
    from equimd.analysis.equivariance import equivariance_error
    from equimd.analysis.throughput import measure_throughput
    from equimd.calculators.ase import EquimdCalculator
    from equimd.models.checkpoint import load_potential


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'equimd' has no attribute {name!r}")
