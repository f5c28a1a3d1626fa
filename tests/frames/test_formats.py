"""npz, databases, and MD trajectories through mdtraj."""

import json
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames import LabelKeys, UnitSpec, labels_of, read_frames, read_list, write_frames
from equimd.units import KCAL_PER_MOL

N = 9


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    ethanol = molecule("CH3CH2OH")
    return {
        "nuclear_charges": ethanol.numbers.astype(np.uint8),
        "coords": ethanol.positions + 0.02 * rng.normal(size=(5, N, 3)),
        "energies": -97000.0 + rng.normal(size=5),
        "forces": 20.0 * rng.normal(size=(5, N, 3)),
    }


def test_rmd17_is_kcal_and_says_so(tmp_path, arrays, caplog):
    np.savez(tmp_path / "a.npz", **arrays)
    frames = read_frames(tmp_path / "a.npz")
    assert len(frames) == 5
    for k, atoms in enumerate(frames):
        np.testing.assert_allclose(atoms.get_forces(), arrays["forces"][k] * KCAL_PER_MOL)
        assert atoms.get_potential_energy() == pytest.approx(arrays["energies"][k] * KCAL_PER_MOL)
        np.testing.assert_array_equal(atoms.positions, arrays["coords"][k])
    assert "taken as kcal/mol and Å" in caplog.text
    caplog.clear()
    with pytest.warns(UserWarning, match="kcal/mol"):
        ev = read_list(tmp_path / "a.npz", units=UnitSpec())
    np.testing.assert_allclose(ev[0].get_forces(), arrays["forces"][0])
    assert not caplog.text


def test_sgdml_names_its_units(tmp_path, arrays, caplog):
    stored = {"z": arrays["nuclear_charges"], "R": arrays["coords"], "E": arrays["energies"][:, None]}
    np.savez(tmp_path / "a.npz", **stored, F=arrays["forces"], e_unit=np.array("kcal/mol"), r_unit=np.array("Ang"))
    frames = read_list(tmp_path / "a.npz")
    np.testing.assert_allclose(frames[3].get_forces(), arrays["forces"][3] * KCAL_PER_MOL)
    assert not caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("coords"), "has keys nuclear_charges, energies, forces; accepted: nuclear_charges coords"),
        (lambda a: a.update(forces=a["forces"][:3]), "forces has 3 frames; accepted: 5"),
        (lambda a: a.update(forces=a["forces"][:, :4]), r"forces has shape \(4, 3\)|forces"),
        (lambda a: a.update(nuclear_charges=a["nuclear_charges"][:4]), r"nuclear_charges has shape \(4,\)"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(tmp_path, arrays, change, message):
    change(arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises((InputError, ValueError), match=message):
        read_list(tmp_path / "a.npz")


def test_a_pickle_posing_as_npz_is_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", z=np.array([print], dtype=object), R=np.zeros((1, 1, 3)))
    with pytest.raises((InputError, ValueError), match="pickle|cannot be read"):
        read_list(tmp_path / "a.npz")


def test_ase_databases_with_labels_in_calculator_pairs_or_data(tmp_path, arrays):
    from ase.db import connect

    ethanol, forces = molecule("CH3CH2OH"), arrays["forces"][0] * 0.05
    with connect(tmp_path / "a.db") as database:
        own = ethanol.copy()
        own.calc = SinglePointCalculator(own, energy=-1.0, forces=forces)
        database.write(own, name="x")
        database.write(ethanol, REF_energy=-2.0, data={"REF_forces": forces})
        database.write(ethanol)
    frames = read_frames(tmp_path / "a.db")
    assert len(frames) == 3
    labels = [labels_of(atoms) for atoms in frames]
    assert [one["energy"] for one in labels] == [-1.0, -2.0, None]
    np.testing.assert_allclose(labels[0]["forces"], forces)
    np.testing.assert_allclose(labels[1]["forces"], forces)
    assert next(iter(frames)).info["name"] == "x"


def test_schnetpack_databases_name_their_units(tmp_path, arrays):
    from ase.db import connect

    with connect(tmp_path / "a.db") as database:
        forces = arrays["forces"][0]
        database.write(molecule("CH3CH2OH"), data={"energy": np.array([-97000.0]), "forces": forces})
        database.metadata = {
            "_property_unit_dict": {"energy": "kcal/mol", "forces": "kcal/mol/Ang"},
            "_distance_unit": "Ang",
        }
    atoms = read_list(tmp_path / "a.db")[0]
    np.testing.assert_allclose(atoms.get_forces(), forces * KCAL_PER_MOL)


def test_databases_are_read_page_by_page(tmp_path, monkeypatch):
    from ase.db import connect
    from ase.db.sqlite import SQLite3Database

    from equimd.frames import tables

    with connect(tmp_path / "a.db") as database:
        for k in range(7):
            database.write(Atoms("H"), REF_energy=float(k))
        database.delete([3])
    original, limits = SQLite3Database._select, []

    def watched(self, *given, **options):
        limits.append(options["limit"])
        return original(self, *given, **options)

    monkeypatch.setattr(SQLite3Database, "_select", watched)
    monkeypatch.setattr(tables, "_ROWS_PER_PAGE", 2)
    energies = [labels_of(atoms)["energy"] for atoms in read_frames(tmp_path / "a.db")]
    assert energies == [0.0, 1.0, 3.0, 4.0, 5.0, 6.0]
    assert limits == [2] * 4


def test_a_damaged_database_is_named(tmp_path):
    from ase.db import connect

    path = tmp_path / "a.db"
    with connect(path) as database:
        for _ in range(50):
            database.write(molecule("C6H6"))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"a.db: cannot be read \(.*\); accepted: a whole database"):
        read_list(path)
    with pytest.raises(InputError, match=r"a.db: cannot be read"):
        len(read_frames(path))


def test_damaged_rows_of_a_database_are_named(tmp_path):
    """Whatever is in the bytes: frames or one line."""
    from ase.db import connect

    path = tmp_path / "a.db"
    with connect(path) as database:
        for k in range(20):
            database.write(molecule("C6H6"), data={"energy": float(k)}, key_value_pairs={"name": "benzene"})
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(4096, len(whole), 300):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_list(path)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert all("a.db" in text for text in refused)


def test_a_locked_database_is_not_called_damaged(tmp_path, monkeypatch):
    import sqlite3

    from ase.db import connect
    from ase.db.sqlite import SQLite3Database

    connect(tmp_path / "a.db").write(molecule("H2O"))

    def locked(*_, **__):
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(SQLite3Database, "_select", locked)
    with pytest.raises(InputError, match="database is locked.*is another program writing"):
        read_list(tmp_path / "a.db")


def test_units_of_a_database_are_those_of_the_named_energy(tmp_path, arrays):
    from ase.db import connect

    with connect(tmp_path / "a.db") as database:
        database.write(molecule("CH3CH2OH"), data={"U": np.array([-97000.0]), "F": arrays["forces"][0]})
        database.metadata = {"_property_unit_dict": {"U": "kcal/mol", "F": "kcal/mol/Ang", "energy": "Ha"}}
    atoms = read_list(tmp_path / "a.db", keys=LabelKeys(energy="U", forces="F"))[0]
    assert atoms.get_potential_energy() == pytest.approx(-97000.0 * KCAL_PER_MOL)
    np.testing.assert_allclose(atoms.get_forces(), arrays["forces"][0] * KCAL_PER_MOL)


@pytest.mark.parametrize("keys", [LabelKeys(), LabelKeys(stress="S")])
def test_a_stress_of_three_atoms_is_no_property_of_theirs(tmp_path, keys):
    from ase.db import connect

    water = molecule("H2O", cell=[5.0] * 3, pbc=True)
    stress = np.diag([0.1, 0.2, 0.3])
    with connect(tmp_path / "a.db") as database:
        database.write(water, data={keys.stress or "REF_stress": stress, "forces": np.ones((3, 3))})
    labels = labels_of(read_list(tmp_path / "a.db", keys=keys)[0])
    np.testing.assert_allclose(labels["stress"], stress)
    np.testing.assert_array_equal(labels["forces"], np.ones((3, 3)))


@pytest.mark.parametrize("suffix", [".traj", ".db"])
def test_the_free_energy_is_read_where_it_is_named(tmp_path, suffix):
    from ase.io import write

    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=-14.0, free_energy=-15.0)
    write(tmp_path / f"a{suffix}", [atoms])
    read = [read_list(tmp_path / f"a{suffix}", keys=LabelKeys(energy=name))[0] for name in (None, "free_energy")]
    assert [labels_of(one)["energy"] for one in read] == [-14.0, -15.0]


def test_structures_that_ase_reads(tmp_path):
    import ase.io

    ase.io.write(tmp_path / "POSCAR", Atoms("Cu4", np.eye(4, 3) * 2, cell=[5, 5, 5], pbc=True), format="vasp")
    assert len(read_list(tmp_path / "POSCAR")[0]) == 4


def save_hdf5(path, trajectory):
    """What mdtraj's own writer leaves (it would need PyTables)."""
    import h5py

    atoms = [{"index": a.index, "name": a.name, "element": a.element.symbol} for a in trajectory.topology.atoms]
    topology = {"chains": [{"index": 0, "residues": [{"index": 0, "name": "ETH", "atoms": atoms}]}], "bonds": []}
    with h5py.File(path, "w") as file:
        file["coordinates"], file["time"] = trajectory.xyz, trajectory.time.astype(np.float32)
        file["cell_lengths"], file["cell_angles"] = trajectory.unitcell_lengths, trajectory.unitcell_angles
        file["topology"] = np.array([json.dumps(topology).encode()])


@pytest.mark.parametrize("suffix", ["xtc", "dcd", "trr", "h5"])
def test_trajectories_are_lossy_and_say_so(tmp_path, suffix):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mdtraj's own making
        import mdtraj

        benzene = molecule("C6H6")  # XTC does not compress 9 atoms or fewer
        topology = mdtraj.Topology()
        residue = topology.add_residue("BNZ", topology.add_chain())
        for symbol in benzene.get_chemical_symbols():
            topology.add_atom(symbol, mdtraj.element.Element.getBySymbol(symbol), residue)
        positions = benzene.positions + 0.05 * np.random.default_rng(0).normal(size=(250, 12, 3))
        trajectory = mdtraj.Trajectory(positions / 10, topology, time=np.arange(250) * 0.5)
        trajectory.unitcell_lengths, trajectory.unitcell_angles = np.full((250, 3), 2.0), np.full((250, 3), 90.0)
        path = tmp_path / f"a.{suffix}"
        if suffix == "h5":
            save_hdf5(path, trajectory)
        else:
            trajectory.save(str(path))
        write_frames(tmp_path / "top.xyz", [benzene])
        frames = read_frames(path, topology=None if suffix == "h5" else tmp_path / "top.xyz")
        read = list(frames)
        assert len(frames) == len(read) == 250
        assert len(list(read_frames(path, topology=tmp_path / "top.xyz", stride=100))) == 3
    assert all(name in read[0].info["lossy"] for name in ("mdtraj-hdf5" if suffix == "h5" else suffix,))
    error = np.abs([atoms.positions for atoms in read] - positions).max()
    assert (1e-3 if suffix == "xtc" else 0) < error < (6e-3 if suffix == "xtc" else 1e-5)
    np.testing.assert_allclose(read[-1].cell.lengths(), 20, rtol=1e-5)
    assert read[0].get_chemical_symbols() == benzene.get_chemical_symbols()
    assert labels_of(read[0])["forces"] is None
    from equimd.frames.trajectories import default_box

    assert "--no-pbc" in str(default_box(read[0]))  # OpenMM's box of a run without one
    if suffix != "dcd":
        assert read[2].info["time_fs"] == pytest.approx(1000.0)
    if suffix != "h5":
        with pytest.raises(InputError, match="with topology=FILE"):
            read_frames(path)
        with pytest.raises(InputError, match="keys= does not apply"):
            read_frames(path, topology=tmp_path / "top.xyz", keys=LabelKeys())
        write_frames(tmp_path / "water.xyz", [molecule("H2O")])
        with pytest.raises(InputError, match="mdtraj cannot read it"):
            read_list(path, topology=tmp_path / "water.xyz")
