"""The public face: each name is what it says, in any order of imports, and refuses bad input in one line."""

import importlib.util
import inspect

import pytest
from pydantic import ValidationError

import equimd
from equimd.analysis.throughput import TimingSettings
from equimd.errors import InputError
from equimd.md.settings import MDSettings
from equimd.models.equivariant import EquivariantSettings
from equimd.models.transformer import TransformerSettings
from equimd.report.comparison import CompareSettings
from equimd.training.recipe import Recipe, make_recipe
from equimd.training.sections import OptimizerSection


@pytest.mark.parametrize("name", equimd._PUBLIC)
def test_every_name_is_a_function_or_a_class(name):
    value = getattr(equimd, name)
    assert inspect.isfunction(value) or inspect.isclass(value)
    assert value.__name__ == name
    assert name in equimd.__all__
    assert name in dir(equimd)


def test_no_module_takes_the_place_of_a_function():
    """A module that is imported becomes an attribute of its package, over any function of that name."""
    assert [name for name in equimd._PUBLIC if importlib.util.find_spec(f"equimd.{name}")] == []
    assert callable(importlib.import_module("equimd.comparison").compare)
    assert equimd.compare is importlib.import_module("equimd.comparison").compare


@pytest.mark.parametrize(
    ("settings", "values", "says"),
    [
        (MDSettings, {"steps": -1}, "steps is -1: "),
        (MDSettings, {"ensemble": "nvx"}, "ensemble is 'nvx': "),
        (MDSettings, {"temperature_K": 0}, "temperature_K is 0 with ensemble nvt"),
        (CompareSettings, {"frames": 0}, "frames is 0: "),
        (CompareSettings, {"stepz": 5}, "unknown key 'stepz' of CompareSettings; accepted are steps, "),
        (TimingSettings, {"block_seconds": "long"}, "block_seconds is 'long': "),
        (EquivariantSettings, {"cutoff": float("nan")}, "cutoff is nan: "),
        (TransformerSettings, {"d_model": 10, "n_heads": 4}, "n_heads must divide d_model"),
        (OptimizerSection, {"betas": [0.9] * 1000}, "betas is "),
        (Recipe, {"name": "x", "model": {"family": "transformer", "d_model": -1}}, "model.transformer.d_model is -1"),
        (Recipe, {"name": "x"}, "the key 'model' is missing"),
    ],
)
def test_settings_made_in_python_are_refused_in_one_line(settings, values, says):
    with pytest.raises(InputError) as caught:
        settings(**values)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert "pydantic" not in message
    assert len(message) < 400
    with pytest.raises(ValidationError):  # of pydantic's own way in, which readers of files use
        settings.model_validate(values)


def test_an_error_inside_a_recipe_keeps_its_place():
    with pytest.raises(InputError, match=r"unknown key 'optimizer.lrr'; did you mean 'lr'"):
        make_recipe({"name": "x", "model": {"family": "transformer"}, "optimizer": {"lrr": 1}})
