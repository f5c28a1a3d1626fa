"""The ablation: every variant is a recipe that differs from the base in what it says."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml

from equimd.training.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("ablation")
    for name in ("ablation", "tables"):
        sys.modules.pop(name, None)


def test_variants_are_recipes_of_their_own(ablation, tmp_path):
    for family in ablation.FAMILIES:
        path = tmp_path / f"{family}.yaml"
        path.write_text(yaml.safe_dump(ablation.recipe(family, minutes=2.0)))
        found = [load_recipe(path, variant.overrides).model_dump_json() for variant in ablation.VARIANTS[family]]
        assert len(set(found)) == len(found)
        labels = [(variant.factor, variant.label) for variant in ablation.VARIANTS[family]]
        assert len(set(labels)) == len(labels)
        assert labels[0][0] == "base"


def test_table_compares_with_the_mean_of_the_base(ablation):
    def row(factor, force_mae):
        return {
            "family": "equivariant",
            "factor": factor,
            "label": "one",
            "n_parameters": 10,
            "steps": 3,
            "frames_per_s": 2.0,
            "valid": {"force_mae": force_mae, "energy_per_atom_mae": 0.001},
            "test": {"force_mae": force_mae},
            "symmetry": {"percent_of_loss": 0.0},
        }

    rows = [row("base", 0.010), row("base", 0.014), row("loss", 0.018)]
    made = {"processor": "a processor", "date": "today", "versions": {"torch": "2", "equimd": "0"}}
    text = ablation.table({"rows": rows, "minutes": 2.0, "jobs": 1, "provenance": made})
    assert "| 18.0 | +50 % | 18.0 |" in text
    assert "| 10.0 | -17 % | 10.0 |" in text
