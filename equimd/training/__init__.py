"""Training: a recipe in, a potential out; the only room that changes weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Recipe": "equimd.training.recipe",
    "TrainingDivergedError": "equimd.training.loop",
    "TrainingResult": "equimd.training.result",
    "load_recipe": "equimd.training.recipe",
    "make_recipe": "equimd.training.recipe",
    "train": "equimd.training.loop",
}

__all__ = ["Recipe", "TrainingDivergedError", "TrainingResult", "load_recipe", "make_recipe", "train"]

if TYPE_CHECKING:
    from equimd.training.loop import TrainingDivergedError, train
    from equimd.training.recipe import Recipe, load_recipe, make_recipe
    from equimd.training.result import TrainingResult


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'equimd.training' has no attribute {name!r}")
