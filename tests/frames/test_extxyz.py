"""Extended XYZ: what is read back, and what the traps of real files do."""

import gzip

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames import (
    LabelKeys,
    PlausibilityWarning,
    UnitSpec,
    labels_of,
    read_frames,
    read_list,
    require_labels,
    strip_labels,
    write_frames,
)


def labelled(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT()
    results = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces", "stress")}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["name"] = "copper"
    return atoms


def comment(path, old: str, new: str):
    path.write_text(path.read_text().replace(old, new))
    return path


@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz.gz", "a.traj"])
def test_labels_survive_a_round_trip(tmp_path, name):
    frames = [labelled(seed) for seed in range(3)]
    write_frames(tmp_path / name, frames)
    back = read_frames(tmp_path / name)
    assert len(back) == 3
    for _ in range(2):  # may be iterated again
        for old, new in zip(frames, back, strict=True):
            for key, value in labels_of(old).items():
                np.testing.assert_allclose(labels_of(new)[key], value, atol=1e-7)
            np.testing.assert_allclose(new.cell.array, old.cell.array, atol=1e-8)
            assert new.pbc.all()
            assert new.info == {"name": "copper"}


def test_our_reader_agrees_with_ase(tmp_path):
    atoms = labelled()
    atoms.set_cell([[4, 0.1, 0.2], [0, 5, 0.3], [0.4, 0, 6]])
    atoms.set_array("tags2", np.arange(4))
    atoms.set_momenta(np.arange(12).reshape(4, 3))
    results = {"energy": 1.5, "forces": np.arange(12.0).reshape(4, 3), "stress": np.arange(6) * 0.01}
    atoms.calc = SinglePointCalculator(atoms, **results)
    write_frames(tmp_path / "a.xyz", [atoms])
    ours, theirs = read_list(tmp_path / "a.xyz")[0], ase.io.read(tmp_path / "a.xyz")
    assert ours == theirs
    assert set(ours.arrays) == set(theirs.arrays)
    np.testing.assert_array_equal(ours.get_stress(), theirs.get_stress())
    np.testing.assert_array_equal(ours.get_momenta(), theirs.get_momenta())
    np.testing.assert_allclose(labels_of(ours)["stress"][1, 2], 0.03)  # yz is the fourth in ASE's order


def test_gz_bytes_depend_on_the_frames_alone(tmp_path):
    for name in ("a.xyz.gz", "b.xyz.gz"):
        write_frames(tmp_path / name, [labelled()])
    assert (tmp_path / "a.xyz.gz").read_bytes() == (tmp_path / "b.xyz.gz").read_bytes()
    write_frames(tmp_path / "b.xyz.gz", [labelled(1)])
    assert (tmp_path / "a.xyz.gz").read_bytes() != (tmp_path / "b.xyz.gz").read_bytes()


@pytest.mark.parametrize(
    ("energy", "forces"), [("Energy", "force"), ("REF_energy", "REF_forces"), ("dft_energy", "Forces")]
)
def test_usual_names_in_any_case(tmp_path, energy, forces):
    write_frames(tmp_path / "a.xyz", [labelled()])
    comment(tmp_path / "a.xyz", "forces:", f"{forces}:")
    comment(tmp_path / "a.xyz", " energy=", f" {energy}=")
    atoms = read_list(tmp_path / "a.xyz")[0]
    np.testing.assert_allclose(atoms.get_forces(), labelled().get_forces(), atol=1e-7)
    assert atoms.get_potential_energy() == pytest.approx(labelled().get_potential_energy())
    assert atoms.info == {"name": "copper"}
    assert set(atoms.arrays) == {"numbers", "positions"}


def test_two_names_that_disagree_are_refused_until_one_is_named(tmp_path):
    write_frames(tmp_path / "a.xyz", [labelled()])
    comment(tmp_path / "a.xyz", " energy=", " REF_energy=-3.5 energy=")
    with pytest.raises(InputError, match="'energy' and 'REF_energy' differ"):
        read_list(tmp_path / "a.xyz")
    atoms = read_list(tmp_path / "a.xyz", keys=LabelKeys(energy="REF_energy"))[0]
    assert atoms.get_potential_energy() == -3.5


def test_a_frame_without_the_named_labels_has_none(tmp_path):
    with_names, without = labelled(), labelled(1)
    with_names.info["REF_energy"], with_names.arrays["REF_forces"] = -3.0, np.ones((4, 3))
    write_frames(tmp_path / "a.xyz", [with_names, without])
    keys = LabelKeys(energy="REF_energy", forces="REF_forces", stress="none")
    one, other = map(labels_of, read_list(tmp_path / "a.xyz", keys=keys, units=UnitSpec()))
    assert one["energy"] == -3.0
    assert other == {"energy": None, "forces": None, "stress": None}


def test_virial_becomes_a_stress_of_opposite_sign(tmp_path):
    atoms = labelled()
    stress = labels_of(atoms)["stress"]
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=atoms.get_forces())
    atoms.info["Virial"] = -stress * atoms.cell.volume
    write_frames(tmp_path / "a.xyz", [atoms])
    np.testing.assert_allclose(labels_of(read_list(tmp_path / "a.xyz")[0])["stress"], stress, atol=1e-9)


def test_a_virial_that_is_a_stress_gets_a_warning(tmp_path):
    atoms = labelled()
    stress = labels_of(atoms)["stress"] * 0.1
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=atoms.get_forces())
    atoms.info["virial"] = stress
    write_frames(tmp_path / "a.xyz", [atoms])
    with pytest.warns(PlausibilityWarning, match="is it a stress"):
        read_list(tmp_path / "a.xyz")
    read = read_list(tmp_path / "a.xyz", keys=LabelKeys(stress="virial", virial="none"))[0]
    np.testing.assert_allclose(labels_of(read)["stress"], stress, atol=1e-9)


def test_vasp_stress_in_kbar_with_its_sign_and_order(tmp_path):
    atoms = labelled()
    xx, yy, zz, yz, xz, xy = (-1602.1766 * atoms.get_stress()).tolist()  # eV/Å³ is 1602.18 kbar
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    atoms.info["dft_stress"] = np.array([xx, yy, zz, xy, yz, xz])
    write_frames(tmp_path / "a.xyz", [atoms])
    keys = LabelKeys(voigt="vasp", stress_sign=-1)
    read = read_list(tmp_path / "a.xyz", units=UnitSpec(stress="kbar"), keys=keys)[0]
    np.testing.assert_allclose(read.get_stress(), labelled().get_stress(), rtol=1e-6)
    with pytest.warns(PlausibilityWarning, match="kbar"):
        wrong = read_list(tmp_path / "a.xyz")[0]
    assert np.abs(wrong.get_stress() - labelled().get_stress()).max() > 0.01


def test_kcal_without_saying_so(tmp_path):
    atoms = molecule("CH3CH2OH")
    forces = np.random.default_rng(0).normal(size=(9, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-100.0 * 23.060548, forces=forces * 23.060548)
    write_frames(tmp_path / "a.xyz", [atoms])
    with pytest.warns(PlausibilityWarning, match="kcal/mol"):
        read_list(tmp_path / "a.xyz")
    right = read_list(tmp_path / "a.xyz", units=UnitSpec(energy="kcal/mol"))[0]
    np.testing.assert_allclose(right.get_forces(), forces, atol=1e-7)
    assert right.get_potential_energy() == pytest.approx(-100.0)
    with pytest.raises(InputError, match="'kcal'; accepted: eV"):
        UnitSpec(energy="kcal")


def test_a_molecule_in_a_box_that_is_not_periodic(tmp_path):
    text = '2\nLattice="50 0 0 0 50 0 0 0 50" Properties=species:S:1:pos:R:3:force:R:3 energy=-31.0 pbc="F F F"'
    text += ' stress="1 0 0 0 1 0 0 0 1"\nH 0 0 0 0 0 0.5\nh 0 0 0.74 0 0 -0.5\n'
    (tmp_path / "a.xyz").write_text(text)
    atoms = read_list(tmp_path / "a.xyz")[0]
    assert not atoms.pbc.any()
    assert atoms.cell.lengths().tolist() == [50, 50, 50]
    assert labels_of(atoms)["stress"] is None  # a volume that means nothing
    periodic = comment(tmp_path / "a.xyz", ' pbc="F F F"', "")
    atoms = read_list(periodic)[0]
    assert atoms.pbc.all()
    assert labels_of(atoms)["stress"] is not None


def test_mixed_sizes_isolated_atoms_and_missing_labels(tmp_path):
    isolated = Atoms("Cu", cell=[50] * 3)
    isolated.calc = SinglePointCalculator(isolated, energy=-0.5, forces=np.zeros((1, 3)))
    write_frames(tmp_path / "a.xyz", [labelled(), isolated, Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]])])
    frames = read_list(tmp_path / "a.xyz")
    assert [len(atoms) for atoms in frames] == [4, 1, 2]
    assert labels_of(frames[1])["energy"] == -0.5
    assert labels_of(frames[2]) == {"energy": None, "forces": None, "stress": None}
    require_labels(frames[:2])
    with pytest.raises(InputError, match=r"1 of 3 frames have no energy \(first: frame 2\)"):
        require_labels(frames)


def test_stride_keeps_every_other_frame(tmp_path):
    write_frames(tmp_path / "a.xyz", [labelled(seed) for seed in range(5)])
    frames = read_frames(tmp_path / "a.xyz", stride=2)
    assert len(frames) == len(list(frames)) == 3
    assert len(read_frames(tmp_path / "a.xyz", stride=5)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: 3 * len(text) // 4], r"frame 1: .*; accepted"),
        (lambda text: text.replace("Cu ", "Xx ", 1), "species 'Xx' is no element"),
        (lambda text: text.replace("4\n", "four\n", 1), "number of atoms is 'four'"),
        (lambda text: text.replace("energy=", "energy=abc", 1), "energy is 'abc"),
        (lambda text: text.replace("energy=", "energy=nan nothing=", 1), "energy has a value that is not finite"),
        (lambda text: text.replace("forces:R:3", "forces:R:2", 1), "columns; accepted: 6"),
        (lambda text: text.replace("pos:R:3", "place:R:3", 1), "lack species or pos"),
        (lambda text: "", "holds no frames"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, change, message):
    write_frames(tmp_path / "a.xyz", [labelled(), labelled(1)])
    (tmp_path / "a.xyz").write_text(change((tmp_path / "a.xyz").read_text()))
    with pytest.raises(InputError, match=message) as refused:
        read_list(tmp_path / "a.xyz")
    assert "\n" not in str(refused.value)


def test_truncated_gzip_missing_file_and_unknown_format(tmp_path):
    write_frames(tmp_path / "a.xyz.gz", [labelled(seed) for seed in range(20)])
    data = (tmp_path / "a.xyz.gz").read_bytes()
    (tmp_path / "a.xyz.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read_list(tmp_path / "a.xyz.gz")
    with pytest.raises(InputError, match="cannot be read"):
        len(read_frames(tmp_path / "a.xyz.gz"))
    with gzip.open(tmp_path / "noise.bin.gz", "wb") as file:
        file.write(b"\0\1\2")
    with pytest.raises(InputError, match="ASE cannot read it"):
        read_list(tmp_path / "noise.bin.gz")
    with pytest.raises(InputError, match="no such file"):
        read_frames(tmp_path / "none.xyz")
    with pytest.raises(InputError, match=r"cannot write '\.pdb'"):
        write_frames(tmp_path / "a.pdb", [labelled()])
    assert not list(tmp_path.glob("*.tmp"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def broken():
        yield labelled()
        raise RuntimeError("disk")

    write_frames(tmp_path / "a.xyz", [labelled()])
    before = (tmp_path / "a.xyz").read_bytes()
    with pytest.raises(RuntimeError, match="disk"):
        write_frames(tmp_path / "a.xyz", broken())
    assert (tmp_path / "a.xyz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.xyz"]


def test_labels_of_never_computes_and_never_returns_stale_labels():
    atoms = labelled()
    assert labels_of(atoms)["energy"] is not None
    moved = atoms.copy()
    assert labels_of(moved)["energy"] is None  # ASE drops the calculator
    atoms.positions[0, 0] += 0.1
    assert labels_of(atoms) == {"energy": None, "forces": None, "stress": None}
    atoms.calc = EMT()
    assert labels_of(atoms)["energy"] is None
    atoms.get_forces()
    assert labels_of(atoms)["forces"].shape == (4, 3)


def test_labels_left_by_other_readers_are_found_and_stripped():
    atoms = bulk("Cu", cubic=True)
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = -1.0, np.ones((4, 3))
    atoms.info["keep"] = 1
    assert labels_of(atoms)["energy"] == -1.0
    bare = strip_labels(atoms)
    assert labels_of(bare) == {"energy": None, "forces": None, "stress": None}
    assert bare.info == {"keep": 1}
    assert "REF_energy" in atoms.info
