"""The comparison: on calculators whose equivariance error is known, and what it does with its folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones

from equimd.comparison import compare, start_structure
from equimd.comparison.contestants import make_contestants, other_levels
from equimd.errors import InputError
from equimd.frames import read_list
from equimd.report.comparison import CompareResult, CompareSettings
from equimd.report.page import render
from equimd.report.table import title
from equimd.testing import AnisotropicMock

LENNARD_JONES = {"sigma": 1.0, "epsilon": 0.05, "rc": 12.0}
SETTINGS = CompareSettings(
    steps=6, frames=3, nve_steps=10, temperature_K=100.0, reference="gfn2-xtb", timing_seconds=0.001
)


def water() -> Atoms:
    return Atoms("OH2", positions=[[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])


def pair():
    return [LennardJones(**LENNARD_JONES), AnisotropicMock()]


@pytest.fixture(scope="module")
def stages():
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compare") / "out"


@pytest.fixture(scope="module")
def result(folder, stages) -> CompareResult:
    return compare(pair(), water(), settings=SETTINGS, output=folder, progress=lambda *stage: stages.append(stage))


def test_blocks_have_the_agreed_shape(result, folder):
    data = json.loads((folder / "results.json").read_text())
    assert data == json.loads(result.to_json())
    assert data["schema_version"] == 1
    for p in data["potentials"]:
        assert {"name", "family", "accuracy", "equivariance", "nve", "throughput"} <= set(p)
        assert {"drift_mev_per_atom_per_ps", "stderr"} <= set(p["nve"])
        assert set(p["accuracy"]["force"]) == {"mae", "rmse"}
        assert {"l_total", "l_mean", "l_equiv", "percent_of_loss"} <= set(p["equivariance"]["loss"])
        assert p["throughput"]["ms_per_step"]["median"] > 0


def test_the_known_errors_are_found(result, folder):
    invariant, mock = result.potentials
    assert invariant.verdict.level == "exact"
    assert invariant.equivariance.force.relative < 1e-13
    frames = read_list(folder / f"{mock.name}.h5")[1:]
    expected = np.sqrt(np.mean([AnisotropicMock().spread(frame) for frame in frames]) / 3)
    # Positions come back from the file to the last bit, so the closed form holds to rounding.
    assert mock.equivariance.force.rmse_equiv == pytest.approx(expected, rel=1e-9)
    assert mock.verdict.level != "exact"


def test_accuracy_is_on_the_same_frames_for_all(result):
    a, b = result.potentials
    assert a.accuracy.n_frames == b.accuracy.n_frames == 6
    assert a.accuracy.force_label_rms == b.accuracy.force_label_rms
    assert a.accuracy_own.n_frames == b.accuracy_own.n_frames == 3
    assert a.accuracy_own.force_label_rms != b.accuracy_own.force_label_rms


def test_runs_share_their_start(result, folder):
    first = [read_list(folder / f"{p.name}.h5")[0] for p in result.potentials]
    np.testing.assert_array_equal(first[0].positions, first[1].positions)
    np.testing.assert_array_equal(first[0].get_momenta(), first[1].get_momenta())


def test_series_agree_with_the_pooled_numbers(result):
    for p in result.potentials:
        assert len(p.trajectory.times_fs) == 3
        assert p.trajectory.times_fs == [1.0, 2.0, 3.0]
        # All frames have the same number of atoms, so pooled means are plain means.
        l_total = np.mean(np.square(p.trajectory.force_rmse))
        l_equiv = np.mean(np.square(p.trajectory.rmse_equiv))
        assert p.equivariance.loss.l_total == pytest.approx(l_total, rel=1e-9)
        assert p.equivariance.loss.percent_of_loss == pytest.approx(100 * l_equiv / l_total, rel=1e-9, abs=1e-20)
        assert p.verdict.ratio == pytest.approx(np.sqrt(l_equiv / l_total), rel=1e-9, abs=1e-12)
        assert len(p.nve_energy.times_fs) == 11
        assert p.nve_energy.mev_per_atom[0] == 0.0


def test_the_same_seed_gives_the_same_physics(result, tmp_path):
    again = compare(pair(), water(), settings=SETTINGS, output=tmp_path / "again")
    for before, after in zip(result.potentials, again.potentials, strict=True):
        # Sums of two threads, and of differently aligned arrays, differ in their last bits; a few steps amplify little.
        assert after.trajectory.temperature_K == pytest.approx(before.trajectory.temperature_K, rel=1e-4)
        assert after.trajectory.force_rmse == pytest.approx(before.trajectory.force_rmse, rel=1e-4)
        assert after.nve_energy.mev_per_atom == pytest.approx(before.nve_energy.mev_per_atom, abs=1e-2)
        assert after.parity.reference == pytest.approx(before.parity.reference, abs=1e-4)
    other = compare(pair(), water(), settings=SETTINGS.model_copy(update={"seed": 1}), output=None)
    temperatures = [run.potentials[0].trajectory.temperature_K for run in (result, other)]
    assert temperatures[1] != pytest.approx(temperatures[0], rel=1e-2)


def test_progress_names_every_stage(result, stages):
    names = [name for name, _, _ in stages]
    for p in result.potentials:
        for stage in ("dynamics", "labels", "equivariance", "accuracy", "energy conservation", "speed"):
            assert f"{p.name}: {stage}" in names
    assert all(done <= total for _, done, total in stages)


def test_the_folder_holds_everything_and_nothing_else(result, folder):
    names = {p.name for p in result.potentials}
    files = {f"{name}{ending}" for name in names for ending in (".h5", "-nve.h5", "-labelled.xyz")}
    assert {path.name for path in folder.iterdir()} == files | {"results.json", "report.html"}


def test_a_folder_in_use_is_left_alone_unless_overwritten(result, folder):
    note = folder / "note.txt"
    note.write_text("mine")
    before = (folder / "results.json").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        compare(pair()[:1], water(), settings=SETTINGS, output=folder)
    assert (folder / "results.json").read_bytes() == before
    compare(pair()[:1], water(), settings=SETTINGS, output=folder, overwrite=True)
    assert (folder / "results.json").read_bytes() != before
    assert note.read_text() == "mine"
    assert not list(folder.glob("unfinished-*"))


def test_bad_input_makes_no_folder(tmp_path):
    out = tmp_path / "out"
    for potentials, structure, settings, says in (
        (pair(), None, SETTINGS, "no structure"),
        (pair(), water(), SETTINGS.model_copy(update={"reference": None}), "accepted as reference"),
        (pair(), water(), SETTINGS.model_copy(update={"reference": "dft"}), "gfn2-xtb"),
        ([], water(), SETTINGS, "at least one"),
        (pair(), Atoms("H2", positions=[[0, 0, 0], [0, 0, np.nan]]), SETTINGS, "finite"),
    ):
        with pytest.raises(InputError, match=says):
            compare(potentials, structure, settings=settings, output=out)
        assert not out.exists()


def test_another_level_of_theory_is_refused_or_noted_beside_every_figure(result, tmp_path):
    trained = AnisotropicMock()
    trained.level_of_theory = "wB97X"
    with pytest.raises(InputError, match="was trained on wB97X, the reference is gfn2-xtb"):
        compare([trained], water(), settings=SETTINGS, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert other_levels(make_contestants([trained], SETTINGS), "gfn2-xtb") == {trained.name: "wB97X"}
    noted = result.model_copy(update={"other_levels": {trained.name: "wB97X"}})
    note = f"another level of theory: {trained.name} was trained on wB97X"
    assert note in title(noted)
    page = render(noted)
    figures = page.count("<figcaption>")
    assert figures > 3
    assert page.count(note) >= figures + 2  # the header, the table and every figure
    assert note not in render(result)


def test_a_structure_is_copied():
    atoms = water()
    assert start_structure([], atoms) is not atoms
