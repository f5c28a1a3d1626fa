"""Labelled HDF5 sets: each layout that is accepted, and that units are never guessed."""

import h5py
import numpy as np
import pytest
from ase.build import molecule

from equimd.errors import InputError
from equimd.frames import LabelKeys, UnitSpec, labels_of, read_frames, read_list
from equimd.frames.electrons import stated_electrons
from equimd.units import BOHR, HARTREE, KCAL_PER_MOL

RNG = np.random.default_rng(0)
WATER, METHANE = molecule("H2O"), molecule("CH4")


def positions(atoms, n):
    return atoms.positions + 0.02 * RNG.normal(size=(n, len(atoms), 3))


def test_flat(tmp_path):
    stored = positions(WATER, 4)
    forces = 20.0 * RNG.normal(size=stored.shape)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["R"], file["Z"] = stored, WATER.numbers
        file["Energies"], file["F"] = np.arange(4.0)[:, None] - 10.0, forces
    frames = read_frames(tmp_path / "a.h5", units=UnitSpec(energy="kcal/mol"))
    assert len(frames) == 4
    for k, atoms in enumerate(frames):
        np.testing.assert_array_equal(atoms.positions, stored[k])
        np.testing.assert_allclose(labels_of(atoms)["forces"], forces[k] * KCAL_PER_MOL)
        assert labels_of(atoms)["energy"] == pytest.approx((k - 10.0) * KCAL_PER_MOL)
    only = list(frames.select(lambda index, n_atoms: index == 2))
    assert [index for index, _ in only] == [2]
    np.testing.assert_array_equal(only[0][1].positions, stored[2])


def test_units_of_attributes_and_gradients_as_in_spice(tmp_path):
    gradient = 0.02 * RNG.normal(size=(3, 5, 3))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, atoms, n in (("methane", METHANE, 3), ("water", WATER, 2)):
            group = file.create_group(name)
            group["atomic_numbers"] = atoms.numbers
            group["conformations"] = positions(atoms, n) / BOHR
            group["dft_total_energy"] = np.full(n, -40.0)
            group["dft_total_gradient"] = gradient if n == 3 else np.zeros((n, 3, 3))
            for key, unit in (("conformations", "bohr"), ("dft_total_energy", "hartree")):
                group[key].attrs["units"] = unit
            group["dft_total_gradient"].attrs["units"] = b"hartree/bohr"
    frames = read_list(tmp_path / "a.hdf5")
    assert [len(atoms) for atoms in frames] == [5, 5, 5, 3, 3]
    np.testing.assert_allclose(frames[1].get_forces(), -gradient[1] * HARTREE / BOHR, rtol=1e-12)
    assert frames[0].get_potential_energy() == pytest.approx(-40.0 * HARTREE)
    assert WATER.get_distance(0, 1) == pytest.approx(frames[4].get_distance(0, 1), abs=0.15)
    with pytest.raises(InputError, match="is in 'bohr', but other units were given"):
        read_list(tmp_path / "a.hdf5", units=UnitSpec())


def test_nested_groups_symbols_and_missing_labels_as_in_ani(tmp_path):
    energies = np.array([-1.0, np.nan, -3.0])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("set/H2O-0")
        group["species"] = [symbol.encode() for symbol in WATER.get_chemical_symbols()]
        group["coordinates"], group["wb97x_dz.energy"] = positions(WATER, 3), energies
    frames = read_list(tmp_path / "a.h5", units=UnitSpec(energy="Hartree"), keys=LabelKeys(energy="wb97x_dz.energy"))
    assert frames[0].get_chemical_symbols() == WATER.get_chemical_symbols()
    found = [labels_of(atoms)["energy"] for atoms in frames]
    assert found[1] is None
    assert found[2] == pytest.approx(-3.0 * HARTREE)


@pytest.mark.parametrize("inner", ["", "/properties"])
def test_a_group_for_each_frame_as_mace_writes(tmp_path, inner):
    """Labels that a frame has not are the text "None"; newer versions keep labels in a group of their own."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for k in range(3):
            group = file.create_group(f"config_batch_0/config_{k}")
            group["atomic_numbers"], group["positions"] = WATER.numbers, WATER.positions + k
            group["cell"], group["pbc"], group["weight"] = 9.0 * np.eye(3), [True] * 3, 1.0
            labels = file.require_group(group.name + inner)
            labels["energy"], labels["forces"] = -1.0 * k if k else "None", np.full((3, 3), 0.1 * k)
            labels["stress"], labels["virials"] = 0.01 * np.eye(3) if k == 2 else "None", "None"
    frames = read_list(tmp_path / "a.h5", units=UnitSpec())
    assert len(frames) == 3
    assert frames[2].get_potential_energy() == -2.0
    assert frames[2].pbc.all()
    np.testing.assert_allclose(frames[2].get_stress(voigt=False), 0.01 * np.eye(3))
    np.testing.assert_allclose(labels_of(frames[1])["forces"], 0.1)
    assert labels_of(frames[0])["energy"] is None
    assert labels_of(frames[1])["stress"] is None


def test_one_of_two_labels_must_be_named(tmp_path):
    path = flat(tmp_path / "a.h5", dft_energy=np.ones(2))
    with pytest.raises(InputError, match=r"/ has \w*energ\w* and \w*energ\w*; .* its name as the key energy"):
        read_list(path, units=UnitSpec())
    named = read_list(path, units=UnitSpec(), keys=LabelKeys(energy="dft_energy"))
    assert labels_of(named[0])["energy"] == 1.0


def test_keys_are_taken_letter_by_letter_and_may_be_paths(tmp_path):
    stored = {"E": np.full(2, -1.0), "e": np.full(2, -2.0), "labels/energy": np.full(2, -3.0)}
    path = flat(tmp_path / "a.h5", **stored, **{"properties/energies": np.full(2, -4.0)})
    for key, value in (("e", -2.0), ("labels/energy", -3.0), ("properties/energies", -4.0), ("energies", 0.0)):
        frames = read_list(path, units=UnitSpec(), keys=LabelKeys(energy=key))
        assert labels_of(frames[0])["energy"] == value
    with pytest.raises(InputError, match="no molecule has 'Energies', the key of energy"):
        read_list(path, units=UnitSpec(), keys=LabelKeys(energy="Energies"))


def test_a_key_is_a_path_from_the_molecule(tmp_path):
    """From the root, every molecule would have the labels of one."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name, energy in (("w1", -10.0), ("w2", -11.0)):
            group = file.create_group(name)
            group["atomic_numbers"], group["positions"] = WATER.numbers, positions(WATER, 2)
            group["energies"], group["dft_energy"] = np.full(2, energy), np.full(2, 2.0 * energy)
    with pytest.raises(InputError, match="/w1 has dft_energy and energies; accepted: one of them, or its name"):
        read_list(path, units=UnitSpec())
    frames = read_list(path, units=UnitSpec(), keys=LabelKeys(energy="dft_energy"))
    assert [labels_of(frame)["energy"] for frame in frames] == [-20.0, -20.0, -22.0, -22.0]
    with pytest.raises(InputError, match="no molecule has '/w1/dft_energy', the key of energy; accepted: .* molecule"):
        read_list(path, units=UnitSpec(), keys=LabelKeys(energy="/w1/dft_energy"))


def test_of_two_gradients_one_must_be_named(tmp_path):
    path = flat(tmp_path / "a.h5", gradient=np.ones((2, 3, 3)), dft_total_gradient=np.ones((2, 3, 3)))
    with h5py.File(path, "a") as file:
        del file["forces"]
    with pytest.raises(InputError, match="gradient and dft_total_gradient; .* its name as the key forces"):
        read_list(path, units=UnitSpec())


def test_gradients_stay_gradients_where_they_are_named(tmp_path):
    gradient = RNG.normal(size=(2, 3, 3))
    path = flat(tmp_path / "a.h5", gradients=gradient, dft_total_gradient=2.0 * gradient)
    for key, forces in ((None, 0.0 * gradient), ("gradients", -gradient), ("dft_total_gradient", -2.0 * gradient)):
        frames = read_list(path, units=UnitSpec(), keys=LabelKeys(forces=key))
        np.testing.assert_allclose(frames[1].get_forces(), forces[1])


def test_of_two_cells_the_first_name_counts(tmp_path):
    path = flat(tmp_path / "a.h5", lattice=20.0 * np.eye(3), cell=30.0 * np.eye(3))
    np.testing.assert_array_equal(read_list(path, units=UnitSpec())[0].cell, 30.0 * np.eye(3))


def flat(path, **changes):
    stored = {"coordinates": positions(WATER, 2), "atomic_numbers": WATER.numbers, "energies": np.zeros(2)}
    with h5py.File(path, "w") as file:
        for name, value in (stored | {"forces": np.zeros((2, 3, 3))} | changes).items():
            file[name] = value
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"forces": np.zeros((2, 4, 3))}, r"forces has shape \(2, 4, 3\); the positions have \(2, 3, 3\)"),
        ({"energies": np.zeros(3)}, r"energies has shape \(3,\)"),
        ({"atomic_numbers": np.arange(1, 5)}, r"has \(4,\) atomic numbers for 3 atoms"),
        ({"atomic_numbers": [b"Qq", b"H", b"H"]}, "the species 'Qq'"),
        ({"forces": np.where(np.arange(18).reshape(2, 3, 3) == 10, np.nan, 0.0)}, r"frame 1 .*forces of atom 0 .*nan"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        read_list(flat(tmp_path / "a.h5", **changes), units=UnitSpec())


def test_units_are_never_guessed(tmp_path):
    with pytest.raises(InputError, match="names no unit; accepted: an attribute 'units', or units given"):
        read_list(flat(tmp_path / "a.h5"))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["something"] = np.zeros(3)
    with pytest.raises(InputError, match="HDF5 with something; accepted"):
        read_frames(tmp_path / "b.h5")


@pytest.mark.parametrize(("shape", "kept"), [((), True), ((4,), True), ((4, 1), True), ((4, 3), False), ((3,), False)])
def test_the_charge_of_a_frame_is_kept(tmp_path, shape, kept):
    """A set of ions must not pass for neutral; charges of atoms say nothing of that."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["R"], file["Z"], file["Total_Charge"] = positions(WATER, 4), WATER.numbers, np.full(shape, -1)
        file["multiplicity"] = np.full(shape, 2)
    for atoms in read_frames(tmp_path / "a.h5", units=UnitSpec()):
        assert atoms.info.get("Total_Charge") == (-1 if kept else None)
        assert atoms.info.get("multiplicity") == (2 if kept else None)


@pytest.mark.parametrize("place", ["dataset", "properties", "attribute", "flat", "npz"])
def test_charges_that_a_set_states(tmp_path, place):
    if place == "npz":
        path = tmp_path / "a.npz"
        stored = {"nuclear_charges": WATER.numbers, "coords": positions(WATER, 3), "energies": np.zeros(3)}
        np.savez(path, **stored, total_charge=np.array([0, 1, 0]), spin=1)
    else:
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            group = file if place == "flat" else file.create_group("water")
            group["atomic_numbers"], group["positions"] = WATER.numbers, positions(WATER, 3)
            group["energy"] = np.zeros(3)
            inner = group.create_group("properties") if place == "properties" else group
            if place == "attribute":
                inner.attrs["charge"], inner.attrs["spin"] = 1, 1
            else:
                inner["total_charge"], inner["spin"] = np.array([0, 1, 0]), 1
    frames = read_list(path, units=UnitSpec())
    stated = [[one.value for one in sorted(stated_electrons(atoms))] for atoms in frames]  # by charge and spin
    assert stated == ([[1.0, 1.0]] * 3 if place == "attribute" else [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
