import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from ase.io import read, write
from safetensors.torch import load_file
from training_samples import E0, TINY, spring_frames, steps_of

from equimd.errors import InputError
from equimd.models.checkpoint import load_checkpoint
from equimd.training import TrainingDivergedError, train
from equimd.training.plan import goes_on
from equimd.training.recipe import make_recipe
from equimd.training.reporting import COLUMNS, MetricsFile
from equimd.training.state import Progress


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# What may differ between a training that was killed and one that was not.
WALL_CLOCK = {"device_hours", "frames_per_s"}


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "last.safetensors", "state.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), (name, key)
    kept = [[{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows(run)] for run in (a, b)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_training_learns_and_writes_everything(folder, values, family):
    values |= {"model": TINY[family], "steps": 60, "optimizer": {"lr": 2e-2}, "batch": {"n_frames": 8}}
    values["loss"] = {"kind": "mse"}
    values["optimizer"]["name"] = "adamw"
    values["data"]["test"] = "test.xyz"
    values["ema"] = {"decay": 0.8}
    result = train(make_recipe(values, folder), folder / "run", progress=False)
    table = rows(folder / "run")
    assert list(table[0]) == list(COLUMNS)
    assert [int(row["epoch"]) for row in table] == list(range(1, 21))
    assert float(table[-1]["valid_force_mae_meV_per_A"]) < 0.7 * float(table[0]["valid_force_mae_meV_per_A"])
    assert result.stopped == "finished"
    assert result.steps == 60
    assert result.test is not None
    assert result.test.n_frames == 6
    potential, header = load_checkpoint(folder / "run" / "model.safetensors", dtype="float64")
    assert potential.family == result.family == family
    assert header["recipe"]["steps"] == 60
    assert header["ledger"]["steps"] == 60
    assert set(header["data_sha256"]) == {"train.xyz", "valid.xyz", "test.xyz"}
    percent = float(table[-1]["percent_of_loss"])
    if family == "equivariant":
        assert percent < 1e-20  # float64: squares of 1e-16 beside errors of order one
        assert header["settings"]["avg_num_neighbors"] > 1
    else:
        assert percent > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_training_continues_bit_for_bit(folder, values, optimizer):
    values |= {"steps": 24, "checkpoint": {"steps": 3, "minutes": None}, "optimizer": {"name": optimizer}}
    values |= {"model": TINY["equivariant" if optimizer == "muon" else "transformer"], "augmentation": {"rotate": True}}
    values["early_stopping"] = {"patience": 50}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    code = "import sys; from equimd.training import train; train(sys.argv[1], sys.argv[2], progress=False)"
    child = subprocess.Popen([sys.executable, "-c", code, str(folder / "recipe.yaml"), str(folder / "killed")])
    try:
        while steps_of(folder / "killed") < 3 and child.poll() is None:
            time.sleep(0.002)
        time.sleep(random.uniform(0.0, 0.1))  # any moment will do
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    train(folder / "recipe.yaml", folder / "killed", resume=True, progress=False)
    train(folder / "recipe.yaml", folder / "whole", progress=False)
    assert_same_run(folder / "killed", folder / "whole")


class Killed(BaseException):
    """Stands for a kill at a chosen moment."""


@pytest.mark.parametrize("moment", ["mid-epoch", "before validation", "after validation", "at the end"])
def test_resume_from_every_kind_of_moment(folder, values, monkeypatch, moment):
    from equimd.training import loop

    values |= {"steps": 10, "checkpoint": {"steps": 2, "minutes": None}}  # 4 steps in an epoch
    recipe = make_recipe(values, folder)
    train(recipe, folder / "whole", progress=False)
    name, calls = {
        "mid-epoch": ("step", 7),
        "before validation": ("validate", 1),
        "after validation": ("step", 5),
        "at the end": ("finish", 1),
    }[moment]
    original = getattr(loop._Training, name)
    count = 0

    def dies(self, *arguments):
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, name, dies)
        with pytest.raises(Killed):
            train(recipe, folder / "killed", progress=False)
    result = train(recipe, folder / "killed", resume=True, progress=False)
    assert_same_run(folder / "killed", folder / "whole")
    assert result.sessions == 2
    again = train(recipe, folder / "killed", resume=True, progress=False)  # finished: nothing is trained any more
    assert again.steps == 10
    assert_same_run(folder / "killed", folder / "whole")


def test_the_comparison_would_notice_a_difference(folder, values):
    train(make_recipe(values, folder), folder / "a", progress=False)
    train(make_recipe({**values, "seed": 4}, folder), folder / "b", progress=False)
    with pytest.raises(AssertionError):
        assert_same_run(folder / "a", folder / "b")


def test_the_ledger_adds_up_over_sessions(folder, values, monkeypatch):
    from equimd.training import ledger, loop

    clock = iter(range(0, 10**9, 36))  # every look at the clock is 0.01 h after the last

    class Time:
        monotonic = staticmethod(lambda: next(clock))

    monkeypatch.setattr(loop, "time", Time)
    monkeypatch.setattr(ledger, "time", Time)
    values["checkpoint"] = {"steps": 2, "minutes": None}
    first = train(make_recipe({**values, "max_minutes": 5.0}, folder), folder / "run", progress=False)
    assert first.stopped == "budget"
    assert first.steps < 10
    assert first.device_hours * 60 >= 5.0
    again = train(make_recipe({**values, "max_minutes": 5.0}, folder), folder / "run", resume=True, progress=False)
    assert again.device_hours > first.device_hours
    assert again.sessions == 2
    assert again.stopped == "budget"
    assert again.steps == first.steps
    with pytest.raises(InputError, match="cannot resume .*max_minutes"):  # its learning rate has fallen already
        train(make_recipe({**values, "max_minutes": 600.0}, folder), folder / "run", resume=True, progress=False)
    values["schedule"] = {"kind": "constant"}
    train(make_recipe({**values, "max_minutes": 5.0}, folder), folder / "constant", progress=False)
    longer = make_recipe({**values, "max_minutes": 600.0}, folder)
    more = train(longer, folder / "constant", resume=True, progress=False)
    assert (more.steps, more.stopped) == (10, "finished")


def test_a_budget_may_be_taken_back():
    recipe = SimpleNamespace(steps=10, epochs=None, max_minutes=6.0)
    spent = Progress(step=4, stopped="budget")
    assert not goes_on(recipe, spent, 0.1)
    assert goes_on(recipe, spent, 0.09)
    assert goes_on(SimpleNamespace(steps=10, epochs=None, max_minutes=None), spent, 0.1)
    assert not goes_on(recipe, Progress(step=4, stopped="early stopping"), 0.0)
    assert not goes_on(recipe, Progress(step=10, stopped="finished"), 0.0)


def test_early_stopping(folder, values):
    values |= {"steps": 400, "early_stopping": {"patience": 1}, "optimizer": {"lr": 1e-300}}
    values["validation"] = {"metric": "energy_rmse", "symmetry_frames": 0}
    result = train(make_recipe(values, folder), folder / "run", progress=False)
    assert result.stopped == "early stopping"
    assert result.steps == 8  # the weights do not move, so the second of two validations is no better
    assert result.best_step == 4
    assert result.symmetry is None


def test_refusals(folder, values):
    (folder / "run").mkdir()
    (folder / "run" / "something").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        train(make_recipe(values, folder), folder / "run", progress=False)
    with pytest.raises(InputError, match="is a file"):
        train(make_recipe(values, folder), folder / "train.xyz", progress=False)
    with pytest.raises(InputError, match=r"loss.stress is 1 but train.xyz has no stress labels"):
        train(make_recipe({**values, "loss": {"stress": 1.0}}, folder), folder / "new", progress=False)
    for change, said in (
        ({"isolated_atom_energies": {"H": 0.0, "C": 0.0}}, "no isolated-atom energy"),
        ({"valid": "missing.xyz"}, "no such file"),
        ({"n_train": 99}, "n_train is 99; the file has 24 frames"),
        ({"units": {"energy": "eVs"}}, "unknown unit of energy: 'eVs'"),
    ):
        recipe = make_recipe({**values, "data": {**values["data"], **change}}, folder)
        with pytest.raises(InputError, match=said):
            train(recipe, folder / "new", progress=False)
    assert not (folder / "new").exists()


def test_resume_refuses_another_recipe_and_other_data(folder, values):
    train(make_recipe(values, folder), folder / "run", progress=False)
    changed = make_recipe({**values, "optimizer": {"lr": 1e-3}}, folder)
    with pytest.raises(InputError, match=r"recipe.optimizer.lr was 0.008 and is now 0.001"):
        train(changed, folder / "run", resume=True, progress=False)
    frames = read(folder / "train.xyz", ":")
    write(folder / "train.xyz", frames[1:], format="extxyz")
    with pytest.raises(InputError, match=r"data_sha256.train.xyz was"):
        train(make_recipe(values, folder), folder / "run", resume=True, progress=False)


def test_a_resume_keeps_the_defaults_that_the_run_began_with(folder, values, monkeypatch):
    from equimd.training import loop

    values["checkpoint"] = {"steps": 2, "minutes": None}
    spelt = {**values, "optimizer": {"name": "adamw", "lr": 2e-3}, "loss": {"kind": "mse"}}
    train(make_recipe(spelt, folder), folder / "whole", progress=False)
    original, count = loop._Training.step, 0

    def dies(self, epoch):
        nonlocal count
        count += 1
        if count == 6:
            raise Killed
        original(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", dies)
        with pytest.raises(Killed):
            train(make_recipe(spelt, folder), folder / "killed", progress=False)
    train(make_recipe(values, folder), folder / "killed", resume=True, progress=False)  # as of 0.1.0: it said nothing
    assert_same_run(folder / "killed", folder / "whole")
    muon = make_recipe({**values, "optimizer": {"name": "muon"}}, folder)
    with pytest.raises(InputError, match=r"recipe.optimizer.name was 'adamw' and is now 'muon'"):
        train(muon, folder / "killed", resume=True, progress=False)


def test_a_budget_of_time_is_a_length_of_its_own(folder, values, monkeypatch):
    from equimd.training import ledger, loop

    clock = iter(range(0, 10**9, 36))  # every look at the clock is 0.01 h after the last

    class Time:
        monotonic = staticmethod(lambda: next(clock))

    monkeypatch.setattr(loop, "time", Time)
    monkeypatch.setattr(ledger, "time", Time)
    del values["steps"]
    values |= {"max_minutes": 60.0, "schedule": {"kind": "linear", "warmup_steps": 0, "final": 0.0}}
    values["checkpoint"] = {"steps": 1, "minutes": None}
    original, count = loop._Training.step, 0

    def dies(self, epoch):
        nonlocal count
        count += 1
        if count == 9:
            raise Killed
        original(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", dies)
        with pytest.raises(Killed):
            train(make_recipe(values, folder), folder / "run", progress=False)
    result = train(make_recipe(values, folder), folder / "run", resume=True, progress=False)
    assert (result.stopped, result.sessions) == ("budget", 2)
    assert result.steps > 10
    rates = [float(row["lr"]) for row in rows(folder / "run")]
    assert rates == sorted(rates, reverse=True)  # the schedule goes on where it was
    assert rates[-1] < 0.1 * rates[0]
    with pytest.raises(InputError, match="cannot resume .*max_minutes"):
        train(make_recipe({**values, "max_minutes": 90.0}, folder), folder / "run", resume=True, progress=False)


@pytest.mark.parametrize("last", ["open", "write_row"])
def test_a_kill_before_the_first_state_is_due(folder, values, monkeypatch, last):
    from equimd.training.files import RunFolder

    values["checkpoint"] = {"minutes": None}
    recipe, original = make_recipe(values, folder), getattr(RunFolder, last)
    train(recipe, folder / "whole", progress=False)

    def dies(self, *arguments):
        original(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, last, dies)
        with pytest.raises(Killed):
            train(recipe, folder / "killed", progress=False)
    train(recipe, folder / "killed", resume=True, progress=False)
    assert_same_run(folder / "killed", folder / "whole")


def test_resume_refuses_results_without_a_state(folder, values):
    recipe = make_recipe({**values, "steps": 4}, folder)
    train(recipe, folder / "run", progress=False)
    before = (folder / "run" / "model.safetensors").read_bytes()
    (folder / "run" / "state.safetensors").unlink()
    with pytest.raises(InputError, match=r"it holds model.safetensors but no state.safetensors to continue from; give"):
        train(recipe, folder / "run", resume=True, progress=False)
    assert (folder / "run" / "model.safetensors").read_bytes() == before


def test_divergence_is_said(folder, values, monkeypatch):
    from equimd.training import loop

    monkeypatch.setattr(loop, "gradient_norm", lambda parameters, limit: torch.tensor(float("inf")))
    with pytest.raises(TrainingDivergedError, match=r"gradient is inf at step 0; lower optimizer.lr"):
        train(make_recipe(values, folder), folder / "run", progress=False)


def test_a_run_is_a_whole_folder_of_a_potential(folder, values):
    frames = read(folder / "train.xyz", ":")
    energies = [atoms.get_potential_energy() - sum(E0[s] for s in atoms.get_chemical_symbols()) for atoms in frames]
    methane = [k for k, atoms in enumerate(frames) if len(atoms) == 5]
    write(folder / "train.xyz", [frames[k] for k in methane], format="extxyz")
    write(folder / "valid.xyz", spring_frames(3, 2, names=("CH4",)), format="extxyz")
    values["data"]["isolated_atom_energies"] = {"H": E0["H"], "C": E0["C"]}
    train(make_recipe({**values, "steps": 2}, folder), folder / "run", progress=False)
    (start,) = read(folder / "run" / "start.xyz", ":")
    lowest = frames[min(methane, key=lambda k: energies[k])]
    assert start.positions == pytest.approx(lowest.positions, abs=1e-7)
    assert start.calc is None
    assert set(start.arrays) == {"numbers", "positions"}


def test_cpu_time_and_other_work_are_in_the_result(folder, values, monkeypatch, capsys):
    from equimd.training import ledger, loop, sharing

    clock = iter(range(0, 10**9, 36))  # every look at the clock is 0.01 h after the last

    class Time:
        monotonic = staticmethod(lambda: next(clock))

    monkeypatch.setattr(loop, "time", Time)
    monkeypatch.setattr(ledger, "time", Time)
    seconds = iter(range(0, 10**9, 18))  # the time of the CPU is half of that
    monkeypatch.setattr(sharing.os, "times", lambda: (next(seconds), 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(sharing.os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    result = train(make_recipe(values, folder), folder / "run", progress=True)
    assert result.cpu_hours is not None
    assert result.shared
    assert result.cpu_hours == pytest.approx(0.05)  # a look for each of ten steps
    assert result.cpu_hours < 0.8 * result.device_hours
    said = [line for line in capsys.readouterr().err.splitlines() if "does other work" in line]
    assert len(said) == 1
    assert "the CPU time is" in said[0]
    _, header = load_checkpoint(folder / "run" / "model.safetensors")
    assert header["ledger"]["cpu_hours"] == result.cpu_hours
    assert header["ledger"]["shared"]


def test_metrics_are_cut_back_to_the_state(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    for step in range(4):
        metrics.append({"step": step, "lr": 0.1, "l_mean": float("nan")})
    again = MetricsFile(tmp_path, 2)
    again.append({"step": 99})
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "99"]
    assert rows(tmp_path)[0]["l_mean"] == ""
    with pytest.raises(InputError, match="fewer than the 7 rows"):
        MetricsFile(tmp_path, 7)


def test_both_learning_rates_are_said(folder, values, capsys):
    values |= {"steps": 1, "optimizer": {"name": "muon", "lr": 3e-3, "muon_lr": 2e-2}}
    result = train(make_recipe(values, folder), folder / "run")
    assert (result.learning_rate, result.muon_learning_rate) == (3e-3, 2e-2)
    assert "; lr 0.003, 0.02 for hidden matrices;" in capsys.readouterr().err


def test_log_lines_without_a_terminal(folder, values, capsys):
    train(make_recipe(values, folder), folder / "run")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("F MAE") == len(rows(folder / "run"))
