"""What a run is besides positions comes back from H5MD (masses, constraints, tags, info, cell), or the file says so."""

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111, molecule
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixInternals
from ase.data import atomic_masses

from equimd.errors import InputError
from equimd.frames import H5MDWriter, labels_of, read_list, write_frames
from equimd.frames.h5md_extras import GROUP, NotStoredWarning
from equimd.frames.masses import wrong_mass
from equimd.units import KJ_PER_MOL

DEUTERIUM = 2.014


def heavy_water() -> Atoms:
    atoms = molecule("H2O")
    atoms.set_masses([15.999, DEUTERIUM, DEUTERIUM])
    atoms.set_momenta(np.arange(9.0).reshape(3, 3))
    return atoms


def test_heavy_water_stays_heavy_and_as_hot(tmp_path):
    atoms = heavy_water()
    write_frames(tmp_path / "a.h5", [atoms, atoms])
    back = read_list(tmp_path / "a.h5")[1]
    np.testing.assert_array_equal(back.get_masses(), [15.999, DEUTERIUM, DEUTERIUM])
    np.testing.assert_allclose(back.get_momenta(), atoms.get_momenta(), rtol=1e-15)  # by way of velocities
    assert back.get_temperature() == pytest.approx(atoms.get_temperature(), rel=1e-14)
    light = molecule("H2O")
    light.set_momenta(atoms.get_momenta())
    assert abs(light.get_temperature() / back.get_temperature() - 1) > 0.1
    write_frames(tmp_path / "b.h5", [light])
    assert not read_list(tmp_path / "b.h5")[0].has("masses")


def test_a_slab_comes_back_whole(tmp_path):
    slab = fcc111("Cu", (2, 2, 2), vacuum=8.0)  # tags are layers, the third direction is not periodic
    slab.set_constraint([FixAtoms([0, 1]), FixCartesian(2, [True, False, False])])
    slab.set_initial_magnetic_moments(np.linspace(-1, 1, 8))
    slab.set_initial_charges(np.linspace(-0.1, 0.1, 8))
    slab.set_momenta(np.ones((8, 3)), apply_constraint=False)
    slab.set_array("name", np.array(["Å", "b"] * 4))
    slab.set_array("frozen", np.arange(8) < 2)
    slab.info.update(charge=-1, spin=2, field=np.array([0.1, 0.0]), remark="λ", nested={"a": [1, 2.5, None]})
    other = slab.copy()
    other.info["charge"] = 0
    write_frames(tmp_path / "a.h5", [slab, other, slab])
    frames = read_list(tmp_path / "a.h5")
    for before, after in zip([slab, other, slab], frames, strict=True):
        assert after.pbc.tolist() == [True, True, False]
        np.testing.assert_array_equal(after.cell.array, before.cell.array)
        assert [one.todict() for one in after.constraints] == [one.todict() for one in before.constraints]
        for name in ("tags", "initial_magmoms", "initial_charges", "name", "frozen"):
            np.testing.assert_array_equal(after.arrays[name], before.arrays[name])
        np.testing.assert_allclose(after.get_momenta(), 1.0, rtol=1e-14)  # those of fixed atoms too
        assert {key: after.info[key] for key in ("charge", "spin", "remark", "nested")} == {
            key: before.info[key] for key in ("charge", "spin", "remark", "nested")
        }
        np.testing.assert_array_equal(after.info["field"], before.info["field"])
    assert [atoms.info["charge"] for atoms in frames] == [-1, 0, -1]
    write_frames(tmp_path / "b.h5", frames)  # once more, from what was read
    assert [atoms.info["charge"] for atoms in read_list(tmp_path / "b.h5")] == [-1, 0, -1]


def test_the_cell_of_a_molecule_is_no_box(tmp_path):
    atoms = molecule("H2O", cell=[9.0, 10.0, 11.0])
    write_frames(tmp_path / "a.h5", [atoms])
    with h5py.File(tmp_path / "a.h5") as file:
        assert "edges" not in file["particles/all/box"]
    back = read_list(tmp_path / "a.h5")[0]
    assert back.cell.lengths().tolist() == [9, 10, 11]
    assert not back.pbc.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.set_masses([16, 1, 1]), "other masses than the first"),
        (lambda a: a.set_tags([1, 0, 0]), "other tags"),
        (lambda a: a.set_initial_charges([1, 0, 0]), "other initial_charges"),
        (lambda a: a.set_initial_magnetic_moments([1, 0, 0]), "other initial_magmoms"),
        (lambda a: a.set_constraint(FixAtoms([0])), "other constraints"),
        (lambda a: a.set_pbc(True), "other pbc"),
    ],
)
def test_frames_of_another_system_are_refused(tmp_path, change, message):
    other = heavy_water()
    change(other)
    writer = H5MDWriter(tmp_path / "a.h5")
    writer.append(heavy_water(), step=0, time_fs=0)
    with pytest.raises(InputError, match=f"the frame at step 1 has {message}"):
        writer.append(other, step=1, time_fs=1)
    writer.append(heavy_water(), step=1, time_fs=1)  # the negative twin
    writer.flush()
    again = H5MDWriter(tmp_path / "a.h5", append=True)
    with pytest.raises(InputError, match=message):
        again.append(other, step=2, time_fs=2)


def test_what_cannot_be_stored_is_named(tmp_path):
    atoms = molecule("H2O")
    atoms.info.update({"code": print, "spectrum": {"peak": object()}, "good": (1, 2)})
    atoms.set_constraint([FixInternals(bonds=[[None, [0, 1]]]), FixBondLengths([[0, 2]])])
    atoms.set_array("q", np.zeros(3))
    moved = atoms.copy()
    moved.set_array("q", np.ones(3))
    with pytest.warns(NotStoredWarning) as caught:
        write_frames(tmp_path / "a.h5", [atoms, moved])
    named = ["array q", "constraint FixInternals", "info code", "info spectrum"]
    assert len(caught) == 1
    assert f"H5MD does not store {', '.join(named)} of the frames" in str(caught[0].message)
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file[GROUP].attrs["not_stored"]) == named
    back = read_list(tmp_path / "a.h5")[1]
    assert back.info["good"] == [1, 2]
    assert [type(one).__name__ for one in back.constraints] == ["FixBondLengths"]
    assert "q" not in back.arrays
    again = H5MDWriter(tmp_path / "a.h5", append=True)
    again.append(atoms, step=2, time_fs=2)
    again.flush()  # no warning: named already


def test_truncation_keeps_info_beside_its_frame(tmp_path):
    frames = [molecule("H2O") for _ in range(4)]
    for k, atoms in enumerate(frames):
        atoms.info["k"] = k
    write_frames(tmp_path / "a.h5", frames)
    writer = H5MDWriter(tmp_path / "a.h5", append=True)
    writer.truncate(2)
    writer.append(frames[3], step=9, time_fs=9.0)
    writer.flush()
    assert [atoms.info["k"] for atoms in read_list(tmp_path / "a.h5")] == [0, 1, 3]


def as_equimd_0_1_0_wrote_it(path) -> None:
    with h5py.File(path, "r+") as file:
        file["particles/all/box/edges"] = file[GROUP]["cell"]
        del file["parameters"]
        force = file["particles/all/force/value"]
        force[...] = force[()] * KJ_PER_MOL
        force.attrs["unit"] = "eV Angstrom-1"


def test_files_of_0_1_0_are_read_and_continued(tmp_path):
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = heavy_water()
    atoms.set_constraint(FixAtoms([0]))
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.arange(9.0).reshape(3, 3))
    write_frames(tmp_path / "a.h5", [atoms])
    as_equimd_0_1_0_wrote_it(tmp_path / "a.h5")
    writer = H5MDWriter(tmp_path / "a.h5", append=True)
    writer.append(atoms, step=1, time_fs=1.0)
    writer.flush()
    frames = read_list(tmp_path / "a.h5")
    assert len(frames) == 2
    for frame in frames:
        np.testing.assert_allclose(labels_of(frame)["forces"], np.arange(9.0).reshape(3, 3), rtol=1e-9)
        assert frame.get_masses()[1] == DEUTERIUM
    writer.truncate(1)
    assert len(read_list(tmp_path / "a.h5")) == 1


def test_a_damaged_group_is_one_line(tmp_path):
    write_frames(tmp_path / "a.h5", [heavy_water()])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file[GROUP]["system"]
        file[GROUP]["system"] = '{"constraints": [{"name": "Evil", "kwargs": {}}], "info": {}}'
    with pytest.raises(InputError, match="parameters/equimd cannot be read"):
        read_list(tmp_path / "a.h5")


def foreign(path, species, mass=None, unit="u", n=None):
    """Positions of a program that stores elements and masses in its own way."""
    count = n or np.shape(species)[-1]
    with h5py.File(path, "w") as file:
        group = file.create_group("particles/atoms")
        position = group.create_group("position")
        position["value"], position["step"] = np.arange(6.0 * count).reshape(2, count, 3), np.arange(2)
        position["value"].attrs["unit"] = "Angstrom"
        for name, values in (("species", species), ("mass", mass)):
            if values is None:
                continue
            values = np.asarray(values)
            if values.ndim == 2:
                element = group.create_group(name)
                element["value"], element["step"] = values, np.arange(len(values))
                values = element["value"]
            else:
                group[name] = values
                values = group[name]
            if name == "mass":
                values.attrs["unit"] = unit
    return path


@pytest.mark.parametrize(
    ("mass", "unit"),
    [
        ([16.0, 2.0, 2.0], "u"),
        ([0.016, 0.002, 0.002], "kg mol-1"),
        ([16.0, 2.0, 2.0], "g mol-1"),
        ([[16.0, 2.0, 2.0]] * 2, "u"),
        ([2.0, 16.0], "u"),  # by species, in their order
    ],
)
def test_masses_of_other_programs_are_honoured(tmp_path, mass, unit):
    path = foreign(tmp_path / "a.h5", [8, 1, 1], mass, unit)
    np.testing.assert_allclose(read_list(path)[0].get_masses(), [16, 2, 2])


def test_one_mass_may_stand_for_all(tmp_path):
    path = foreign(tmp_path / "a.h5", [18] * 4, 39.0)
    np.testing.assert_array_equal(read_list(path)[0].get_masses(), 39.0)


@pytest.mark.parametrize(
    ("species", "mass", "message"),
    [
        ([1] * 8, 12.011, r"species 1 \(H\) of atom 0 has mass 12.011, not 1 to 3 u: type indices"),
        ([1] * 8, [12.011] * 8, r"species 1 \(H\)"),
        ([[1] * 8] * 2, [[12.011] * 8] * 2, r"species 1 \(H\)"),
        ([1, 2, 3], [1.008, 15.999, 12.011], r"species 2 \(He\)"),
        ([1, 3, 3], [1.008, 12.011, 12.011], r"species 3 \(Li\) of atom 1 has mass 12.011, not 6 to 7"),
        ([6, 6], [1.0, 1.0], r"species 6 \(C\)"),
        ([29, 29], [69.7, 69.7], r"species 29 \(Cu\)"),
        ([1] * 8, None, "species 1 to 1 and no masses"),
        ([1, 2, 3], None, "species 1 to 3 and no masses"),
        ([8, 1], [16.0, -1.0], "values that are not positive"),
        ([8, 1], [16.0, np.nan], "values that are not positive"),
        ([8, 1, 1], [1.0, 2.0, 3.0, 4.0], r"has shape \(4,\), for 3 atoms"),
        ([8, 1], [[16.0, 1.0], [16.0, 2.0]], "masses change"),
        ([[8, 1], [1, 8]], None, "species change"),
    ],
)
def test_masses_that_are_not_those_of_the_elements_are_refused(tmp_path, species, mass, message):
    with pytest.raises(InputError, match=message):
        read_list(foreign(tmp_path / "a.h5", species, mass))


def test_a_topology_overrides_types_and_keeps_masses(tmp_path):
    path = foreign(tmp_path / "a.h5", [1, 2, 2], [12.0, 7.0, 1.0])
    write_frames(tmp_path / "top.xyz", [Atoms("CHH", np.eye(3))])
    atoms = read_list(path, topology=tmp_path / "top.xyz")[0]
    assert atoms.get_chemical_formula() == "CH2"
    np.testing.assert_array_equal(atoms.get_masses(), [12, 7, 1])
    heavy = Atoms("CHH", np.eye(3))
    heavy.set_masses([13.003, 2.014, 2.014])
    heavy.write(tmp_path / "top.traj")
    np.testing.assert_array_equal(read_list(path, topology=tmp_path / "top.traj")[0].get_masses(), heavy.get_masses())


@pytest.mark.parametrize("species", [[b"O", b"H"], ["o", "h"], [8, 1]])
def test_species_are_names_or_numbers(tmp_path, species):
    values = np.array(species, dtype=h5py.string_dtype() if isinstance(species[0], str) else None)
    assert read_list(foreign(tmp_path / "a.h5", values))[0].get_chemical_symbols() == ["O", "H"]


def test_every_element_has_its_own_mass_and_not_its_neighbours():
    numbers = np.arange(1, 119)
    assert wrong_mass(numbers, atomic_masses[numbers]) is None
    for number in range(1, 16):  # types are few; sulphur 36 is as heavy as chlorine
        others = [z for z in range(1, 20) if abs(atomic_masses[z] - atomic_masses[number]) > 2.5]
        assert all(wrong_mass(np.array([number]), atomic_masses[[z]]) == 0 for z in others), number


def test_repartitioned_hydrogen_is_no_mistake():
    ethane = molecule("C2H6")
    numbers, masses = ethane.numbers, ethane.get_masses()
    for heavy in (1.5, 3.024, 4.0):  # OpenMM's hydrogenMass
        moved = np.where(numbers == 1, heavy, masses - 3 * (heavy - 1.008))
        assert wrong_mass(numbers, moved) is None
    assert wrong_mass(numbers, np.where(numbers == 1, 4.0, masses)) == int((numbers == 1).argmax())  # nothing taken
    assert wrong_mass(numbers, np.where(numbers == 1, 5.0, masses - 3 * (5.0 - 1.008))) is not None
