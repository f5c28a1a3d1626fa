"""The ablation: every variant is a recipe that differs from the base in what it says."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

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
            "processor": "a processor",
            "date": "2026-01-02" if factor == "loss" else "2026-01-01",
            "versions": {"torch": "2" if factor == "loss" else "1", "equimd": "0"},
        }

    rows = [row("base", 0.010), row("base", 0.014), row("loss", 0.018)]
    text = ablation.table({"rows": rows, "minutes": 2.0, "jobs": 1})
    assert "| 18.0 | +50 % | 18.0 |" in text
    assert "| 10.0 | -17 % | 10.0 |" in text
    assert "its seeds: -17 to +17 %" in text
    assert "a processor, 2026-01-01 to 2026-01-02; torch==1, equimd==0 and torch==2, equimd==0." in text


def test_only_trainings_of_the_same_recipe_data_and_code_are_used_again(ablation, tmp_path, monkeypatch):
    trainings = []

    def train(command, **_):
        family, overrides, minutes, jobs, folder = json.loads(command[-1])
        trainings.append(folder)
        Path(folder).mkdir(parents=True)
        inputs = ablation.made_from(ablation.resolved(family, overrides, minutes), jobs)
        made = {"processor": "a processor", "date": "2026-01-01", "versions": {"torch": "2", "equimd": "0"}}
        keys = ("n_parameters", "steps", "frames_per_s", "device_hours", "test", "symmetry")
        result = dict.fromkeys(keys) | {"valid": {"force_mae": 0.01}}
        row = {"made_from": inputs, "result": result, "provenance": made}
        (Path(folder) / ablation.ROW).write_text(json.dumps(row))
        return SimpleNamespace(stderr="")

    def run(rate=1e-3, minutes=2.0, jobs=1):
        variant = ablation.Variant("learning rate", "other", (f"optimizer.lr={rate}",))
        row = ablation.run("transformer", variant, minutes, jobs, tmp_path / "work")
        assert row["valid"] == {"force_mae": 0.01}
        return len(trainings)

    monkeypatch.setattr(ablation.subprocess, "run", train)
    assert [run(), run()] == [1, 1]
    assert [run(minutes=3.0), run(rate=2e-3), run(jobs=2), run()] == [2, 3, 4, 4]
    monkeypatch.setattr(ablation, "version", lambda _: "other")
    assert run() == 5
    assert len(set(trainings)) == 5


def test_hashes_are_those_of_data_and_code(ablation, tmp_path, monkeypatch):
    data, code = tmp_path / "data" / "train.xyz.gz", tmp_path / "equimd" / "training" / "loop.py"
    for path in (data, code, tmp_path / "data" / "info.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    monkeypatch.setattr(ablation, "DATA", tmp_path / "data")
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    before = ablation._hashes()
    data.write_text("two")
    after = ablation._hashes()
    assert (after["data"] != before["data"], after["code"] == before["code"]) == (True, True)
    code.write_text("two")
    assert (ablation._hashes()["data"] == after["data"], ablation._hashes()["code"] != after["code"]) == (True, True)


def test_an_unknown_factor_is_refused(ablation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation", "--only", "lerning rate"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert "--only is 'lerning rate'; accepted are DeNS, average of weights, base" in capsys.readouterr().err


def test_what_fails_is_said_and_nothing_is_written(ablation, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation.subprocess, "run", lambda *_, **__: SimpleNamespace(stderr="a\nno room", returncode=1))
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(ablation, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["ablation", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="no room"):
        ablation.main()
    assert list(tmp_path.iterdir()) == []
