"""A potential that explodes or fails is an answer beside the others; what was simulated is not repeated."""

import json
import shutil

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from test_comparison import LENNARD_JONES, water
from test_comparison import SETTINGS as SLOWER

import equimd.references as references
from equimd.comparison import StoppedWarning, compare
from equimd.errors import InputError
from equimd.frames import read_list
from equimd.references import LabelWarning
from equimd.report import load_results
from equimd.report.page import render
from equimd.report.table import rows
from equimd.units import KB_EV_PER_K


class Strange(LennardJones):
    """Lennard-Jones until its n-th evaluation, from which on ``how`` says what goes wrong."""

    name = "strange"

    def __init__(self, calls: int, how: str = "explode"):
        super().__init__(**LENNARD_JONES)
        self.calls, self.how, self.left = calls, how, calls

    def calculate(self, *args, **kwargs):
        """As Lennard-Jones, for a while."""
        super().calculate(*args, **kwargs)
        self.left -= 1
        if self.left < 0 and self.how == "raise":
            raise ArithmeticError("no\nconvergence")
        if self.left < 0:
            self.results["forces"] = self.results["forces"] + (1e4 if self.how == "explode" else np.nan)


class Walled(LennardJones):
    """Explodes wherever the oxygen has left its place by 0.02 Å, always at the same point of a run."""

    name, limit = "walled", 0.02

    def calculate(self, *args, **kwargs):
        """Lennard-Jones, and a force of 1e4 eV/Å beyond."""
        super().calculate(*args, **kwargs)
        if np.abs(self.atoms.positions[0]).max() > self.limit:
            self.results["forces"] = self.results["forces"] + 1e4


def walled(name="walled", limit=0.02):
    out = Walled(**LENNARD_JONES)
    out.name, out.limit = name, limit
    return out


SETTINGS = SLOWER.model_copy(update={"degree": 0})  # eight rotations
HOT = SETTINGS.model_copy(update={"steps": 30, "frames": 10, "temperature_K": 600.0, "timestep_fs": 1.0})


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    """One that lives and one that explodes in the middle of its Langevin run, in a folder."""
    folder = tmp_path_factory.mktemp("exploded") / "out"
    with pytest.warns(StoppedWarning, match=r"walled: it explodes at 0\.0\d+ ps: a force is .* eV/Å, more than 200"):
        result = compare([LennardJones(**LENNARD_JONES), walled()], water(), settings=HOT, output=folder)
    return result, folder


def test_an_explosion_is_an_answer_beside_the_others(exploded):
    result, folder = exploded
    lives, walled = result.potentials
    assert lives.stopped is None
    assert lives.nve is not None
    assert (walled.stopped.what, walled.stopped.ensemble) == ("explodes", "nvt")
    frames = read_list(folder / "walled.h5")[1:]
    assert 0 < len(frames) == walled.equivariance.n_frames < 10
    # it explodes after its last frame and before the next, three steps of 1 fs later
    assert 0 <= 1e3 * walled.stopped.time_ps - frames[-1].info["time_fs"] < 3 + 1e-9
    assert walled.trajectory.times_fs == [frame.info["time_fs"] for frame in frames]
    assert walled.nve is None
    assert walled.accuracy_own.n_frames == len(frames)


def test_frames_on_the_way_to_an_explosion_are_not_common(exploded):
    result, _ = exploded
    lives, walled = result.potentials
    assert lives.accuracy.n_frames == walled.accuracy.n_frames == lives.accuracy_own.n_frames == 10
    assert "Frames of walled, whose run is not whole" in render(result)


def test_table_words_and_page_say_what_happened(exploded):
    result, folder = exploded
    when = f"explodes at {result.potentials[1].stopped.time_ps:.4g} ps"
    table = {row.label.strip(): row.values for row in rows(result)}
    assert table["Molecular dynamics"] == ["to its end", when]
    assert table["NVE energy drift"][1] == "–" != table["NVE energy drift"][0]
    assert "–" not in table["Force error (MAE)"]
    assert any(line.startswith(f"walled: it {when}: a force is") for line in result.verdict)
    page = (folder / "report.html").read_text()
    assert page.count(when) == 3  # its card's headline and reason, and the table
    assert page.count("<svg") == 6
    assert render(load_results(folder)) == page


def test_all_explode_and_there_is_still_a_report(tmp_path):
    with pytest.warns(StoppedWarning) as warned:
        result = compare([walled("a", -1.0), Strange(0, "raise")], water(), settings=HOT, output=tmp_path / "out")
    assert len(warned) >= 2
    first, second = result.potentials
    assert first.stopped.time_ps == second.stopped.time_ps == 0
    assert "of the start structure" in first.stopped.reason
    assert second.stopped.reason == "ArithmeticError: no convergence"
    assert (first.equivariance, first.accuracy, first.verdict, second.throughput) == (None, None, None, None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No frame was labelled" in page
    assert "no drift" not in page
    assert "energy conservation is not known" in result.verdict[-1]
    assert load_results(tmp_path / "out").to_json() == result.to_json()


def test_calculators_that_fail_in_the_middle(tmp_path):
    raises, nan = Strange(25, "raise"), Strange(25, "nan")
    nan.name = "nan"
    with pytest.warns(StoppedWarning):
        result = compare([raises, nan, LennardJones(**LENNARD_JONES)], water(), settings=HOT, output=tmp_path / "out")
    raises, nan, lives = result.potentials
    assert [(p.stopped.what, p.stopped.ensemble) for p in (raises, nan)] == [("fails", "nvt"), ("explodes", "nvt")]
    assert all(0.0 < p.stopped.time_ps < 0.03 for p in (raises, nan))
    assert lives.stopped is None
    # they stay broken; how long an evaluation takes that gives NaN is known
    assert {"equivariance", "accuracy", "speed"} <= set(raises.missing)
    assert {"equivariance", "accuracy"} <= set(nan.missing)
    assert "not finite" in nan.missing["accuracy"]
    assert (raises.accuracy, nan.accuracy) == (None, None)
    assert any(line.startswith("strange: it fails at") for line in result.verdict)
    assert any(line.startswith("nan: it explodes at") for line in result.verdict)
    assert load_results(tmp_path / "out").to_json() == result.to_json()


def test_an_explosion_in_nve(tmp_path):
    """After its Langevin run it lives for 4 more evaluations, with all of its own measurements before."""
    late = Strange(10**9)
    before = []

    def progress(name, done, total):
        if name == "late: energy conservation" and not before:
            before.append(name)
            late.left = 6

    late.name = "late"
    with pytest.warns(StoppedWarning, match="late: it explodes at .* ps of NVE: a force is"):
        result = compare([late], water(), settings=HOT, output=tmp_path / "out", progress=progress)
    (measured,) = result.potentials
    assert measured.stopped.ensemble == "nve"
    assert measured.nve is None
    assert 1 < len(measured.nve_energy.times_fs) < 11
    assert measured.equivariance.n_frames == 10
    assert measured.accuracy.n_frames == 10
    assert render(result).count("<svg") >= 5


def fails_on(monkeypatch, which):
    """A reference that fails on some of the frames it is asked for, in order; the calls it got."""
    calls, original = [], references._single_point

    def sometimes(atoms, name):
        calls.append(atoms)
        return "CalculationFailed: no self-consistency" if which(len(calls) - 1) else original(atoms, name)

    monkeypatch.setattr(references, "_single_point", sometimes)
    return calls


def test_a_frame_that_the_reference_cannot_label_is_left_out(tmp_path, monkeypatch):
    fails_on(monkeypatch, lambda k: k == 1)
    with pytest.warns(
        LabelWarning, match=r"fails on 1 of 3 frames of lennardjones, .*frame 1: CalculationFailed: no se"
    ):
        result = compare(
            [LennardJones(**LENNARD_JONES), walled("b", np.inf)], water(), settings=SETTINGS, output=tmp_path / "out"
        )
    first, second = result.potentials
    assert (first.n_failed, second.n_failed) == (1, 0)
    assert first.accuracy.n_frames == second.accuracy.n_frames == 5
    assert first.accuracy_own.n_frames == 2
    assert first.equivariance.n_frames == 3  # which needs no labels
    assert first.equivariance.loss.n_frames == 2
    assert np.isnan(first.trajectory.force_rmse[1])
    assert np.isnan(first.trajectory.percent_of_loss[1])
    assert len(read_list(tmp_path / "out" / "lennardjones-labelled.xyz")) == 2
    assert any("fails on 1 frames of lennardjones" in line for line in result.verdict)
    assert render(load_results(tmp_path / "out")).count("<svg") == 6


def test_a_reference_that_labels_nothing_is_refused_and_the_runs_are_kept(tmp_path, monkeypatch):
    fails_on(monkeypatch, lambda k: True)
    with (
        pytest.warns(LabelWarning),
        pytest.raises(InputError, match="gfn2-xtb fails on all 3 frames .*no self-consistency"),
    ):
        compare([LennardJones(**LENNARD_JONES)], water(), settings=SETTINGS, output=tmp_path / "out")
    assert len(read_list(tmp_path / "out" / "lennardjones.h5")) == 4


@pytest.fixture
def no_page(monkeypatch):
    """Draw nothing, which takes longer than such short runs."""
    monkeypatch.setattr("equimd.comparison.run.write_report", lambda _, folder: (folder / "report.html").touch())


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def killed_at(stage, done_at=1):
    def progress(name, done, total):
        if name == stage and done >= done_at:
            raise Killed

    return progress


def pair():
    return [LennardJones(**LENNARD_JONES), walled("b", np.inf)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return compare(pair(), water(), settings=SETTINGS, output=tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("stage", ["b: dynamics", "b: labels", "b: equivariance", "b: energy conservation"])
def test_a_killed_comparison_goes_on_with_what_is_there(no_page, tmp_path, monkeypatch, whole, stage):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compare(pair(), water(), settings=SETTINGS, output=out, progress=killed_at(stage))
    first = (out / "lennardjones.h5").stat().st_mtime_ns
    labelled_before = [stem for stem in ("lennardjones", "b") if (out / f"{stem}-labels.json").exists()]
    calls = fails_on(monkeypatch, lambda k: False)
    result = compare(pair(), water(), settings=SETTINGS, output=out, resume=True)
    assert (out / "lennardjones.h5").stat().st_mtime_ns == first
    assert len(calls) == 6 - 3 * len(labelled_before)
    assert len(labelled_before) == {"b: dynamics": 0, "b: labels": 1}.get(stage, 2)
    for one, other in zip(result.potentials, whole.potentials, strict=True):
        assert one.trajectory.temperature_K == other.trajectory.temperature_K
        assert one.trajectory.force_rmse == pytest.approx(other.trajectory.force_rmse, rel=1e-9)  # threads of tblite
        assert one.nve_energy == other.nve_energy
    files = {f"{name}{ending}" for name in ("lennardjones", "b") for ending in (".h5", "-nve.h5", "-labelled.xyz")}
    assert {path.name for path in out.iterdir()} == files | {"results.json", "report.html"}
    again = compare(pair(), water(), settings=SETTINGS, output=out, resume=True)  # it is done
    assert again.to_json() == result.to_json()


def test_a_comparison_that_was_begun_otherwise_is_refused_by_name(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compare(pair(), water(), settings=SETTINGS, output=out, progress=killed_at("b: labels"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    moved = water()
    moved.positions[2] += 0.1
    heavy = water()
    heavy.set_masses([16.0, 2.014, 2.014])
    for potentials, structure, changes, says in (
        (pair(), water(), {"seed": 7}, "seed was 0 and is 7"),
        (pair(), water(), {"degree": 2}, "degree was 0 and is 2"),
        (pair(), water(), {"steps": 8}, "steps was 6 and is 8"),
        ([*pair(), walled("c")], water(), {}, "potentials were lennardjones, b and are lennardjones, b, c"),
        (pair()[::-1], water(), {}, "potentials were"),
        (pair(), moved, {}, "positions changed: .*of atom 2"),
        (pair(), heavy, {}, "masses changed"),
    ):
        with pytest.raises(InputError, match=says):
            compare(potentials, structure, settings=SETTINGS.model_copy(update=changes), output=out, resume=True)
        assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(InputError, match=r"holds an unfinished comparison; go on with it by --resume, .*--overwrite"):
        compare(pair(), water(), settings=SETTINGS, output=out)


def test_overwriting_is_resumed_too_and_replaces_only_at_its_end(no_page, tmp_path):
    out = tmp_path / "out"
    compare(pair()[:1], water(), settings=SETTINGS, output=out)
    old = (out / "results.json").read_bytes()
    new = SETTINGS.model_copy(update={"seed": 5})
    with pytest.raises(Killed):
        compare(
            pair()[:1], water(), settings=new, output=out, overwrite=True, progress=killed_at("lennardjones: labels")
        )
    assert (out / "results.json").read_bytes() == old
    result = compare(pair()[:1], water(), settings=new, output=out, resume=True)
    assert result.settings.seed == 5
    assert json.loads((out / "results.json").read_text())["settings"]["seed"] == 5
    assert not list(out.glob("unfinished*"))
    with pytest.raises(InputError, match="seed was 5 and is 6"):
        compare(pair()[:1], water(), settings=SETTINGS.model_copy(update={"seed": 6}), output=out, resume=True)


def test_overwriting_an_unfinished_comparison_leaves_nothing_of_it(no_page, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compare(pair()[:1], water(), settings=SETTINGS, output=out, progress=killed_at("lennardjones: equivariance"))
    compare(pair()[:1], water(), settings=SETTINGS, output=out, overwrite=True)
    assert not [path for path in out.iterdir() if "state" in path.name or "labels.json" in path.name]
    assert not list(out.glob("unfinished*"))


def test_names_that_make_the_same_files_are_kept_apart(no_page, tmp_path):
    one, two = walled("a b", np.inf), walled("A_b", np.inf)
    result = compare([one, two], water(), settings=SETTINGS, output=tmp_path / "out")
    assert [p.name for p in result.potentials] == ["a b", "A_b-2"]
    assert (tmp_path / "out" / "a_b.h5").exists()
    assert (tmp_path / "out" / "A_b-2.h5").exists()


def test_fixed_atoms_and_isotopes_go_through_both_runs(no_page, tmp_path):
    atoms = water()
    atoms.set_masses([15.999, 2.014, 2.014])
    atoms.set_constraint(FixAtoms([0]))
    result = compare([LennardJones(**LENNARD_JONES)], atoms, settings=SETTINGS, output=tmp_path / "out")
    runs = [read_list(tmp_path / "out" / f"lennardjones{ending}") for ending in (".h5", "-nve.h5")]
    assert all((frame.positions[0] == atoms.positions[0]).all() for frames in runs for frame in frames)
    # velocities are in the file whatever it keeps of masses; six degrees of freedom of two deuterons are left
    by_hand = [2.014 * (frame.get_velocities()[1:] ** 2).sum() / (6 * KB_EV_PER_K) for frame in runs[0][1:]]
    assert result.potentials[0].trajectory.temperature_K == pytest.approx(by_hand, rel=1e-9)
    np.testing.assert_array_equal(runs[1][0].positions, runs[0][-1].positions)
    np.testing.assert_allclose(runs[1][0].get_velocities(), runs[0][-1].get_velocities(), rtol=1e-12)


def test_a_bond_that_breaks_without_a_large_force_is_told(no_page, tmp_path):
    pair_ = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]])
    pair_.set_momenta([[0, 0, -0.6], [0, 0, 0.6]])
    free = LennardJones(sigma=0.01, epsilon=0.0, rc=0.1)
    settings = SETTINGS.model_copy(update={"steps": 40, "frames": 20, "timestep_fs": 1.0, "friction_per_fs": 1e-6})
    result = compare([free], pair_, settings=settings, output=tmp_path / "out")
    stability = result.potentials[0].stability
    # 0.5 Å at a relative speed of 2 · 0.6 / 1.008 sqrt(eV/amu), which are 0.0982 Å/fs each
    assert stability.first_broken_ps == pytest.approx(0.5 / (1.19 * 0.0982) / 1e3, abs=0.002)
    assert stability.broken_bond == (0, 1)
    assert any("distance of atoms 0 and 1" in line for line in result.verdict)
    shutil.rmtree(tmp_path / "out")
