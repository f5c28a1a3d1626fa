"""What a frame holds, through each format: read back equal, or said not to be written."""

import io
import warnings

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian
from ase.db import connect

from equimd.errors import InputError
from equimd.frames import labels_of, read_list, write_frames
from equimd.frames.losses import NotWrittenWarning
from equimd.frames.xyz_writer import FrameFormatter
from equimd.md.output import ExtxyzOutput

RESULTS = {
    "energy": -14.0,
    "free_energy": -14.5,
    "forces": np.arange(9.0).reshape(3, 3) / 8,
    "stress": np.arange(6.0) / 128,
    "dipole": np.array([0.5, 0.0, -0.25]),
    "charges": np.array([-0.5, 0.25, 0.25]),
    "magmom": 0.5,
    "magmoms": np.array([0.5, 0.0, 0.0]),
    "energies": np.array([-12.0, -1.0, -1.0]),
    "stresses": np.arange(18.0).reshape(3, 6) / 128,
}


def heavy_water() -> Atoms:
    """D2O with all that ASE's atoms can hold; numbers of few binary digits, so that eight decimals are exact."""
    atoms = molecule("H2O", cell=[[6, 0, 0], [1, 7, 0], [0, 0.5, 8]], pbc=[True, True, False])
    atoms.positions = np.round(atoms.positions * 64) / 64
    atoms.set_masses([15.999, 2.014, 2.014])
    atoms.set_tags([1, 2, 3])
    atoms.set_momenta(np.arange(9).reshape(3, 3) / 16)
    atoms.set_initial_charges([-0.5, 0.25, 0.25])
    atoms.set_initial_magnetic_moments([0.5, 0, 0])
    atoms.set_constraint([FixAtoms([0]), FixCartesian([1], mask=[True, False, True])])
    atoms.info = {"name": "007", "step": 3, "time_fs": 1.5, "on": True, "list": [1, 2], "tree": {"a": [1.5, "x"]}}
    atoms.calc = SinglePointCalculator(atoms, **RESULTS)
    return atoms


def fixed(atoms: Atoms) -> np.ndarray:
    """True where forces of one are not passed on, (N, 3)."""
    forces = np.ones((len(atoms), 3))
    for constraint in atoms.constraints:
        constraint.adjust_forces(atoms, forces)
    return forces == 0


def assert_same(new: Atoms, old: Atoms, results: dict) -> None:
    assert set(new.arrays) == set(old.arrays)
    for name, values in old.arrays.items():
        np.testing.assert_array_equal(new.arrays[name], values)
    np.testing.assert_array_equal(new.cell.array, old.cell.array)
    assert new.pbc.tolist() == old.pbc.tolist()
    np.testing.assert_array_equal(fixed(new), fixed(old))
    assert set(new.info) == set(old.info)
    for key, value in old.info.items():
        np.testing.assert_array_equal(new.info[key], value)
    assert set(new.calc.results) == set(results)
    for name, value in results.items():
        np.testing.assert_array_equal(new.calc.results[name], value)


@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz.gz", "a.traj"])
@pytest.mark.parametrize("write", [write_frames, ase.io.write])
def test_everything_comes_back(tmp_path, name, write):
    atoms = heavy_water()
    if write is ase.io.write and "xyz" in name:
        atoms.info["name"] = "seven"  # ASE writes 007 as a number
    write(tmp_path / name, [atoms, atoms])
    for back in read_list(tmp_path / name):
        assert_same(back, heavy_water() if atoms.info["name"] == "007" else atoms, RESULTS)


def test_everything_that_a_database_of_ase_holds_comes_back(tmp_path):
    atoms = heavy_water()
    data = {"text": "x", "tree": {"a": 1}, "spectrum": np.arange(4.0)}
    with connect(tmp_path / "a.db") as database:
        database.write(atoms, key_value_pairs={"kind": "water", "step": 3}, data=data)
    atoms.info = {"kind": "water", "step": 3, **data}
    back = read_list(tmp_path / "a.db")[0]
    held = {name: RESULTS[name] for name in RESULTS if name in back.calc.results}
    assert {"energy", "free_energy", "forces", "stress", "dipole", "charges", "magmom", "magmoms"} <= set(held)
    assert_same(back, atoms, held)


def test_what_was_read_can_be_written_again(tmp_path):
    write_frames(tmp_path / "a.xyz", [heavy_water()])
    write_frames(tmp_path / "b.xyz", read_list(tmp_path / "a.xyz"))
    assert_same(read_list(tmp_path / "b.xyz")[0], heavy_water(), RESULTS)


def test_ordinary_frames_are_the_text_that_ase_writes():
    atoms = heavy_water()
    atoms.info = {"name": "water", "x": 0.1, "k": np.arange(3)}
    theirs = io.StringIO()
    ase.io.write(theirs, atoms, format="extxyz")
    assert FrameFormatter("a").format(atoms, "a") == theirs.getvalue()


def test_md_writes_masses_constraints_and_momenta_to_extxyz(tmp_path):
    output = ExtxyzOutput(tmp_path / "a.xyz", append=False)
    output.append(heavy_water(), 3, 1.5, 300.0)
    output.flush()
    expected = heavy_water()
    expected.info["temperature_K"] = 300.0
    assert_same(read_list(tmp_path / "a.xyz")[0], expected, RESULTS)


def test_a_mask_of_other_programs_fixes_atoms(tmp_path):
    text = "2\nProperties=species:S:1:pos:R:3:move_mask:I:1\nH 0 0 0 1\nH 0 0 0.74 0\n"
    (tmp_path / "a.xyz").write_text(text)
    atoms = read_list(tmp_path / "a.xyz")[0]
    assert fixed(atoms).tolist() == [[False] * 3, [True] * 3]
    assert "move_mask" not in atoms.arrays
    (tmp_path / "a.xyz").write_text(text.replace("0.74 0", "0.74 1"))
    assert read_list(tmp_path / "a.xyz")[0].constraints == []


def test_labels_are_those_without_constraints(tmp_path):
    for name in ("a.xyz", "a.traj"):
        write_frames(tmp_path / name, [heavy_water()])
        np.testing.assert_array_equal(labels_of(read_list(tmp_path / name)[0])["forces"], RESULTS["forces"])


@pytest.mark.parametrize("name", ["mass", "Masses", "MASS"])
@pytest.mark.parametrize("unit", [1.0, 103.6427])  # amu, and QUIP's eV fs²/Å²
def test_masses_of_other_programs_are_read(tmp_path, name, unit):
    lines = [f"H {k} 0 0 {mass * unit}\n" for k, mass in enumerate((2.014, 1.008))]
    (tmp_path / "a.xyz").write_text(f"2\nProperties=species:S:1:pos:R:3:{name}:R:1\n" + "".join(lines))
    assert read_list(tmp_path / "a.xyz")[0].get_masses() == pytest.approx([2.014, 1.008], rel=1e-6)
    (tmp_path / "a.xyz").write_text(f"2\nProperties=species:S:1:pos:R:3:{name}:R:1\nH 0 0 0 1.0\nH 1 0 0 12.0\n")
    with pytest.raises(InputError, match=f"column '{name}' gives atom 1 a mass of 12; accepted: masses in amu"):
        read_list(tmp_path / "a.xyz")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.xyz", lambda a: a.set_constraint(FixBondLengths([[0, 1]])), "cannot hold the constraint FixBondLengths"),
        ("a.xyz", lambda a: a.info.update(f=print), "cannot hold the info 'f'"),
        ("a.xyz", lambda a: a.info.update(pbc=3), "cannot hold the info 'pbc'"),
        ("a.xyz", lambda a: a.new_array("t", np.zeros((3, 2, 2))), "cannot hold the array 't'"),
        ("a.xyz", lambda a: a.new_array("t", np.array(["a b", "", "c"])), "cannot hold the array 't'"),
        ("a.xyz", lambda a: a.positions.__iadd__(0.5), "holds energy, .* of other positions"),
        ("a.traj", lambda a: a.new_array("t", np.zeros(3)), "cannot hold the array 't'"),
        ("a.traj", lambda a: a.info.update(f=print), "cannot hold the info 'f'"),
        ("a.traj", lambda a: a.positions.__iadd__(0.5), "holds energy, .* of other positions"),
    ],
)
def test_what_is_not_written_is_said_once(tmp_path, name, change, message):
    atoms = heavy_water()
    change(atoms)
    with pytest.warns(NotWrittenWarning, match=message) as said:
        write_frames(tmp_path / name, [atoms, atoms, atoms])
    assert len(said) == 1
    back = read_list(tmp_path / name)[2]
    assert np.array_equal(back.get_masses(), atoms.get_masses())
    assert (labels_of(back)["energy"] is None) == ("positions" in message)


def test_bond_constraints_stay_in_a_trajectory(tmp_path):
    atoms = heavy_water()
    atoms.set_constraint(FixBondLengths([[0, 1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_frames(tmp_path / "a.traj", [atoms])
    assert read_list(tmp_path / "a.traj")[0].constraints[0].todict() == atoms.constraints[0].todict()


def test_tiny_numbers_and_columns_of_all_kinds_come_back(tmp_path):
    atoms = Atoms("HHe", [[0, 0, 0], [0, 0, 2]])
    columns = {
        "tiny": np.array([1.5e-9, -2e-12]),
        "text": np.array(["a", "bb"]),
        "flags": np.array([[True, False], [False, True]]),
        "counts": np.array([3, 4], dtype=np.uint8),
        "single": np.array([[0.5], [0.25]]),
        "wide": np.arange(10.0).reshape(2, 5),
    }
    for name, values in columns.items():
        atoms.new_array(name, values)
    write_frames(tmp_path / "a.xyz", [atoms])
    back = read_list(tmp_path / "a.xyz")[0]
    for name, values in columns.items():
        np.testing.assert_array_equal(np.reshape(back.arrays[name], values.shape), values)


def test_an_entry_that_contradicts_the_calculator_is_refused(tmp_path):
    atoms = heavy_water()
    atoms.info["energy"] = -3.0
    with pytest.raises(InputError, match=r"a.xyz, frame 0: the calculator and atoms.info hold different val"):
        write_frames(tmp_path / "a.xyz", [atoms])
    write_frames(tmp_path / "a.traj", [atoms])
    with pytest.raises(InputError, match="'energy' has one value as a result and another in info"):
        read_list(tmp_path / "a.traj")
