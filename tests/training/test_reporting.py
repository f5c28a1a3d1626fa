"""What a training shows and writes while it runs, and what it notices of other work on its machine."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from training_samples import spring_frames

from equimd.training import reporting, sharing, train
from equimd.training.recipe import make_recipe
from equimd.training.reporting import MetricsFile


@pytest.mark.parametrize(
    ("hours", "cpu", "load", "says"),
    [
        (1.0, 0.97, 1.0, None),
        (1.0, 1.9, 2.2, None),  # two threads
        (1.0, 0.5, 1.0, "the CPU time is 50 % of the clock's"),
        (1.0, 0.97, 7.0, "the load is 7.0 on 4 cores"),
        (0.01, 0.001, 9.0, None),  # too short to tell
    ],
)
def test_what_tells_of_other_work(monkeypatch, hours, cpu, load, says):
    monkeypatch.setattr(sharing.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(sharing.os, "getloadavg", lambda: (load, 0.0, 0.0))
    session = sharing.Sharing(on_cpu=True)
    session.look(hours)
    assert session.verdict(hours, cpu) == says
    if says is not None and "CPU" in says:
        assert sharing.Sharing(on_cpu=False).verdict(hours, cpu) is None


def test_a_log_is_not_silent_while_epochs_are_long(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(reporting, "time", SimpleNamespace(monotonic=lambda: now))
    with reporting.Reporter("long", True) as reporter:
        reporter.bar = None
        for _ in range(1200):  # a step in a second, an epoch in an hour
            reporter.advance(now / 3600.0, lambda: "epoch 0: loss 1, 5 frames/s")
            now += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "long: 0.833 % epoch 0: loss 1, 5 frames/s 59.5 min left"
    assert len(lines) == 5  # after 30, 60, 120, 240, 480 seconds
    with reporting.Reporter("silent", False) as reporter:
        now = 1e6
        reporter.advance(0.5, lambda: "")
    assert not capsys.readouterr().err


def test_stress_errors_are_shown(folder, values, capsys):
    from equimd.cli.train import _show

    for name, n, seed in (("train", 24, 1), ("valid", 6, 2)):
        frames = spring_frames(n, seed)
        for atoms in frames:
            results = {**atoms.calc.results, "stress": np.full(6, 0.01)}
            atoms.set_cell(np.eye(3) * 9.0)
            atoms.pbc = True
            atoms.calc = SinglePointCalculator(atoms, **results)
        write(folder / f"{name}.xyz", frames, format="extxyz")
    result = train(make_recipe({**values, "steps": 4}, folder), folder / "run", progress=True)
    with open(folder / "run" / "metrics.csv", encoding="utf-8") as file:
        table_row = list(csv.DictReader(file))[-1]
    error = 1e3 * result.valid.stress_mae
    assert float(table_row["valid_stress_mae_meV_per_A3"]) == pytest.approx(error, rel=1e-5)
    assert f"stress MAE {error:.4g} meV/Å³" in capsys.readouterr().err
    table = _show(result, folder)
    cells = [list(column.cells) for column in table.columns]
    place = cells[0].index("Stress error (MAE), validation")
    assert cells[1][place] == f"{error:.4g}"
    assert cells[2][place] == f"meV/Å³ ({error / 1e3 * 160.21766:.4g} GPa)"


def test_metrics_of_an_older_version_keep_their_columns(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,lr\n4,0.1\n")
    MetricsFile(tmp_path, 1).append({"step": 8, "lr": 0.05, "valid_stress_mae_meV_per_A3": 1.0})
    assert (tmp_path / "metrics.csv").read_text() == "step,lr\n4,0.1\n8,0.05\n"
