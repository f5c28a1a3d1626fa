"""Predictions stay predictions wherever they are stored, and are not taken for labels."""

import json
import warnings

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from toys import ToyPotential

from equimd.analysis.accuracy import evaluate_accuracy
from equimd.analysis.equivariance import Extras, equivariance_error
from equimd.analysis.inputs import PredictionWarning
from equimd.calculators.ase import EquimdCalculator
from equimd.errors import InputError
from equimd.frames import labels_of, read_list, strip_labels, write_frames
from equimd.md import iterate_md, run_md
from equimd.md.settings import make_settings
from equimd.origin import KEY, origin_of, predicted_by
from equimd.references import check_level, label, level_mismatch
from equimd.theory import method_of

BARE = Extras(floor_frames=0, check_frames=0)


@pytest.fixture(scope="module")
def calculator() -> EquimdCalculator:
    return EquimdCalculator(ToyPotential(), self_check=False)


def water() -> Atoms:
    return Atoms("OH2", positions=[[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])


def labelled(value: float = 0.3) -> Atoms:
    atoms = water()
    atoms.calc = SinglePointCalculator(atoms, energy=-2067.0, forces=np.full((3, 3), value) - value * np.eye(3))
    return atoms


@pytest.mark.parametrize("suffix", [".h5", ".xyz"])
def test_an_md_run_is_known_as_its_potentials_own(tmp_path, calculator, suffix):
    file = tmp_path / f"run{suffix}"
    run_md(water(), calculator, make_settings(steps=4, stride=2, timestep_fs=0.1), file)
    frames = read_list(file)
    assert [predicted_by(frame) for frame in frames] == [calculator.origin] * 3
    assert labels_of(frames[0])["forces"] is not None  # they are still there to look at
    with pytest.raises(InputError, match=f"3 of 3 frames carry predictions .*{calculator.origin[:20]}"):
        evaluate_accuracy(calculator, frames)
    with pytest.warns(PredictionWarning, match="which are no labels"):
        result = equivariance_error(calculator, frames, degree=2, extras=BARE)
    assert result.loss is None
    assert result.force.rmse_equiv > 0.01
    # The twin: who says so gets the comparison, which is meaningless.
    own = evaluate_accuracy(calculator, frames, accept_predictions=True)
    assert own.force is not None
    assert own.force.mae < 1e-5


@pytest.mark.parametrize("name", ["copy.h5", "copy.xyz", "copy.xyz.gz", "copy.traj", "ase.traj", "ase.db", "ase.xyz"])
def test_every_format_keeps_the_origin(tmp_path, calculator, name):
    frames = [frame for _, frame in iterate_md(water(), calculator, make_settings(steps=2, stride=1, timestep_fs=0.1))]
    path = tmp_path / name
    if name == "ase.xyz":  # ASE writes no calculator into it, so the frame must say it
        write_frames(tmp_path / "ours.h5", frames)
        ase.io.write(path, read_list(tmp_path / "ours.h5"))
    elif name.startswith("ase"):
        ase.io.write(path, frames)
    else:
        write_frames(path, frames)
    assert [predicted_by(frame) for frame in read_list(path)] == [calculator.origin] * 3


def test_a_live_calculator_is_known_in_the_files_that_ase_writes(tmp_path, calculator):
    atoms = water()
    atoms.calc = calculator
    atoms.get_forces()
    ase.io.write(tmp_path / "live.traj", atoms)
    write_frames(tmp_path / "live.xyz", [atoms])
    for name in ("live.traj", "live.xyz"):
        assert predicted_by(read_list(tmp_path / name)[0]) == calculator.origin


@pytest.mark.parametrize(
    ("name", "is_prediction"),
    [("mace", True), ("MACECalculator", True), ("chgnet", True), ("orb", True), ("vasp", False), ("tblite", False)],
)
def test_files_of_others_are_judged_by_the_name_of_the_calculator(tmp_path, name, is_prediction):
    for file in ("other.traj", "other.db"):
        atoms = labelled()
        atoms.calc.name = name
        ase.io.write(tmp_path / file, atoms)
        (read,) = read_list(tmp_path / file)
        assert (predicted_by(read) is not None) == is_prediction


def test_labels_of_a_reference_are_labels(tmp_path, calculator):
    for file in ("set.xyz", "set.h5", "set.traj"):
        write_frames(tmp_path / file, [labelled()])
        frames = read_list(tmp_path / file)
        assert predicted_by(frames[0]) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert evaluate_accuracy(calculator, frames).force.mae > 0.1
            assert equivariance_error(calculator, frames, degree=2, extras=BARE).loss is not None


def test_new_labels_take_the_place_of_predictions(tmp_path, calculator):
    run_md(water(), calculator, make_settings(steps=1, stride=1, timestep_fs=0.1), tmp_path / "run.xyz")
    frames = ase.io.read(tmp_path / "run.xyz", ":")
    assert KEY in frames[0].info
    relabelled = label(frames, "gfn2-xtb")
    assert [predicted_by(frame) for frame in relabelled] == [None] * 2
    assert KEY not in strip_labels(frames[0]).info


def test_what_a_frame_says_of_its_predictions_is_not_said_of_labels_that_come_later(tmp_path, calculator):
    """As in active learning: frames of a run, labelled by a reference, written by ASE."""
    run_md(water(), calculator, make_settings(steps=1, stride=1, timestep_fs=0.1), tmp_path / "run.h5")
    frames = read_list(tmp_path / "run.h5")
    for atoms in frames:
        forces = labels_of(atoms)["forces"] + 0.01
        atoms.calc = SinglePointCalculator(atoms, energy=labels_of(atoms)["energy"] + 0.3, forces=forces)
    assert [predicted_by(frame) for frame in frames] == [None] * 2
    for write in (ase.io.write, write_frames):
        write(tmp_path / "labelled.xyz", frames)
        read = read_list(tmp_path / "labelled.xyz")
        assert [predicted_by(frame) for frame in read] == [None] * 2
        assert evaluate_accuracy(calculator, read).force.mae == pytest.approx(0.01, rel=1e-3)
    # The twin: with the energy of the prediction they are predictions still.
    for atoms in read_list(tmp_path / "run.h5"):
        atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
        ase.io.write(tmp_path / "same.xyz", atoms)
        assert predicted_by(read_list(tmp_path / "same.xyz")[0]) == calculator.origin


def test_a_file_has_one_origin(tmp_path, calculator):
    predicted = next(iterate_md(water(), calculator, make_settings(steps=0)))[1]
    with pytest.raises(InputError, match="accepted: one origin"):
        write_frames(tmp_path / "mixed.h5", [predicted, labelled()])
    assert not (tmp_path / "mixed.h5").exists()


def test_a_run_with_a_reference_method_makes_labels():
    class TBLite(Calculator):
        name = "tblite"

    assert origin_of(TBLite()) is None
    assert origin_of(LennardJones()) == "lennardjones"


class Trained:
    """A stand-in for a calculator whose recipe names a level of theory."""

    name = "trained"

    def __init__(self, level: str | None) -> None:
        self.level_of_theory = level


@pytest.mark.parametrize(
    ("level", "same"), [("GFN2-xTB", True), ("gfn2_xtb", True), (None, True), ("ωB97X/6-31G(d)", False)]
)
def test_levels_of_theory_are_compared_by_letters_and_digits(level, same):
    assert (level_mismatch(Trained(level), "gfn2-xtb") is None) == same
    if not same:
        with pytest.raises(InputError, match="trained was trained on ωB97X.*reference is gfn2-xtb"):
            check_level(Trained(level), "gfn2-xtb")
    check_level(Trained(level), "gfn2-xtb", other_level=True)


def test_another_level_of_theory_is_refused_or_stands_beside_every_figure(calculator):
    calculator = EquimdCalculator(ToyPotential(), self_check=False)
    calculator.header = {"recipe": {"data": {"reference": "wB97X"}}}
    with pytest.raises(InputError, match="trained on wB97X, the reference is gfn2-xtb"):
        evaluate_accuracy(calculator, [water()], "gfn2-xtb")
    with pytest.raises(InputError, match="trained on wB97X, the reference is gfn2-xtb"):
        equivariance_error(calculator, [water()], reference="gfn2-xtb")
    accuracy = evaluate_accuracy(calculator, [water()], "gfn2-xtb", other_level=True)
    symmetry = equivariance_error(calculator, [water()], 2, reference="gfn2-xtb", other_level=True, extras=BARE)
    assert accuracy.other_level == symmetry.other_level == "trained on wB97X, judged by gfn2-xtb"
    assert json.loads(symmetry.to_json())["other_level"] == "trained on wB97X, judged by gfn2-xtb"
    calculator.header = {"recipe": {"data": {"reference": "GFN2-xTB"}}}
    assert evaluate_accuracy(calculator, [water()], "gfn2-xtb").other_level is None


@pytest.mark.parametrize(
    ("entry", "is_prediction"),
    [
        ({"calculator": "mace"}, True),
        ({"Method": "MACE-OFF23"}, True),
        ({"calculator": "VASP"}, False),
        ({"method": "PBE"}, False),
        ({"model": "TIP3P"}, False),
        ({"note": "mace"}, False),
    ],
)
def test_a_comment_line_that_names_the_potential(tmp_path, entry, is_prediction):
    atoms = labelled()
    atoms.info.update(entry)
    ase.io.write(tmp_path / "other.xyz", atoms)
    assert (predicted_by(read_list(tmp_path / "other.xyz")[0]) is not None) == is_prediction


def test_a_potential_is_no_reference(calculator):
    for reference in (calculator, SumCalculator([LennardJones(), calculator])):
        with pytest.raises(
            InputError, match="the reference is a potential .*; accepted: a reference method, or accept"
        ):
            evaluate_accuracy(calculator, [water()], reference)
        with pytest.raises(InputError, match="the reference is a potential"):
            equivariance_error(calculator, [water()], 2, reference=reference, extras=BARE)
    assert evaluate_accuracy(calculator, [water()], calculator, accept_predictions=True).force.mae == 0.0
    assert evaluate_accuracy(calculator, [water()], LennardJones()).force.mae > 0.0


@pytest.mark.parametrize(
    ("entry", "same"),
    [
        ({"reference": "gfn1-xtb"}, False),
        ({"level_of_theory": "wB97M-D3BJ/def2-TZVPPD"}, False),
        ({"method": "B3LYP"}, False),
        ({"Reference": "GFN2-xTB"}, True),
        ({"method": "normal modes"}, True),
        ({}, True),
    ],
)
def test_a_level_that_frames_state_is_compared(entry, same):
    calculator = EquimdCalculator(ToyPotential(), self_check=False)
    calculator.header = {"reference": "GFN2-xTB"}
    frames = [labelled()]
    frames[0].info.update(entry)
    if same:
        assert evaluate_accuracy(calculator, frames).other_level is None
        return
    with pytest.raises(InputError, match="frame 0 was labelled by .*was trained on GFN2-xTB"):
        evaluate_accuracy(calculator, frames)
    with pytest.raises(InputError, match="frame 0 was labelled by"):
        equivariance_error(calculator, frames, 2, extras=BARE)
    (level,) = entry.values()
    allowed = equivariance_error(calculator, frames, 2, other_level=True, extras=BARE)
    assert allowed.other_level == f"trained on GFN2-xTB, judged by {level}"
    calculator.header = {}  # a potential that does not say what it was trained on
    assert evaluate_accuracy(calculator, frames).other_level is None


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("PBE-D3(BJ)/def2-SVP", "pbe"),
        ("PBE0", "pbe0"),
        ("revPBE", "revpbe"),
        ("ωB97X/6-31G(d)", "wb97x"),
        ("rattle", None),
    ],
)
def test_methods_are_found_in_names_of_levels(text, method):
    assert method_of(text) == method
