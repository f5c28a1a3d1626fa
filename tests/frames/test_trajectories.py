"""PDB, mmCIF, GRO, Amber's and LAMMPS's trajectories: every frame with its box and elements; and parts of frames."""

import gzip
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames import LossyWarning, PlausibilityWarning, labels_of, read_frames, read_list, write_frames
from equimd.frames.atom_names import element_of
from equimd.units import ASE_TIME_FS

# Rounded positions are what these formats are; that they are said is tested by name.
pytestmark = pytest.mark.filterwarnings("ignore::equimd.frames.LossyWarning")

NAMES = ("O", "H1", "H2")


def waters(n: int = 4) -> Atoms:
    atoms = Atoms()
    for k in range(n):
        water = molecule("H2O")
        water.translate(np.array([k % 2, k // 2 % 2, k // 4]) * 3.1)
        atoms += water
    atoms.rattle(0.02, seed=0)
    return atoms


def line(k: int, atom: str, residue: str, number: int, xyz, element: str = "", location: str = " ") -> str:
    """A record as the format has it; a name of four letters begins a column earlier."""
    name = atom if len(atom) == 4 else f" {atom:<3}"
    place = "".join(f"{x:8.3f}" for x in xyz)
    start = f"HETATM{k % 100000:5d} {name}{location}{residue:>3} A{number:4d}"
    return f"{start}    {place}  1.00  0.00          {element:>2}\n"


def model(atoms: Atoms, elements: bool = True) -> str:
    return "".join(
        line(k + 1, NAMES[k % 3], "HOH", k // 3 + 1, one.position, one.symbol if elements else "")
        for k, one in enumerate(atoms)
    )


def cryst1(*lengths: float) -> str:
    return "CRYST1{:9.3f}{:9.3f}{:9.3f}  90.00  90.00  90.00 P 1           1\n".format(*lengths)


def openmm_topology(atoms: Atoms, box: float):
    from openmm import app, unit

    topology = app.Topology()
    chain = topology.addChain()
    for k in range(len(atoms) // 3):
        residue = topology.addResidue("HOH", chain)
        for name, symbol in zip(NAMES, atoms.symbols[3 * k : 3 * k + 3], strict=True):
            topology.addAtom(name, app.Element.getBySymbol(symbol), residue)
    topology.setPeriodicBoxVectors(np.eye(3) * box * unit.angstrom)
    return topology


@pytest.mark.parametrize("suffix", ["pdb", "cif"])
def test_what_openmm_writes_has_its_box_in_every_model(tmp_path, suffix):
    from openmm import app, unit

    atoms = waters()
    topology, path = openmm_topology(atoms, 12.5), tmp_path / f"a.{suffix}"
    writer = app.PDBFile if suffix == "pdb" else app.PDBxFile
    with open(path, "w") as file:
        writer.writeHeader(topology, file)
        for k in range(3):
            writer.writeModel(topology, (atoms.positions + k) * unit.angstrom, file, modelIndex=k + 1)
        if suffix == "pdb":
            writer.writeFooter(topology, file)
    frames = read_frames(path)
    assert len(frames) == 3  # ASE finds four in the PDB file, the last one empty
    for k, frame in enumerate(frames):
        np.testing.assert_allclose(frame.cell.lengths(), 12.5, atol=1e-3)
        assert frame.pbc.all()
        np.testing.assert_allclose(frame.positions, atoms.positions + k, atol=6e-4)  # three digits
        assert frame.get_chemical_symbols() == atoms.get_chemical_symbols()
    oxygen = read_list(path, select="water and name O")
    assert [one.get_chemical_formula() for one in oxygen] == ["O4"] * 3
    assert frames.lossy is not None


def test_each_model_has_its_own_box(tmp_path):
    atoms = waters()
    text = ""
    for k, length in enumerate((9.0, 9.5, 10.0)):  # GROMACS's order of records
        text += f"TITLE     water t= {k * 2.0:.5f} step= {k}\n{cryst1(length, length, length)}MODEL     {k + 1:4d}\n"
        text += model(atoms) + "TER\nENDMDL\n"
    for name, write in (("a.pdb", open), ("a.pdb.gz", gzip.open)):
        with write(tmp_path / name, "wt") as file:
            file.write(text)
        frames = read_list(tmp_path / name)
        assert [frame.cell.lengths()[0] for frame in frames] == [9.0, 9.5, 10.0]
        assert [frame.info["time_fs"] for frame in frames] == [0, 2000, 4000]


@pytest.mark.parametrize("separator", ["END\n", "ENDMDL\n", "TER\nENDMDL\nEND\n", "MODEL        2\n"])
def test_models_end_in_many_ways_and_one_box_holds(tmp_path, separator, caplog):
    (tmp_path / "a.pdb").write_text(cryst1(9, 9, 9) + model(waters()) + separator + model(waters()))
    frames = read_list(tmp_path / "a.pdb")
    assert [len(frame) for frame in frames] == [12, 12]
    assert [frame.cell.lengths()[0] for frame in frames] == [9, 9]
    assert "names its box once" not in caplog.text or separator != "END\n"


@pytest.mark.parametrize("header", ["", cryst1(1, 1, 1), cryst1(0, 0, 0)])
def test_a_dummy_box_is_none(tmp_path, header):
    (tmp_path / "a.pdb").write_text(header + model(waters()) + "END\n")
    frame = read_list(tmp_path / "a.pdb")[0]
    assert not frame.pbc.any()
    assert not frame.cell.any()


def test_a_box_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.pdb").write_text(cryst1(9, 9, 0) + model(waters()))
    with pytest.raises(InputError, match="the box is 9, 9, 0, 90, 90, 90; accepted: positive lengths"):
        read_list(tmp_path / "a.pdb")


def test_atoms_of_one_name_and_large_numbers_are_all_read(tmp_path):
    lines = [line(k, "C", "MOL", 1, (k % 100, k // 100 % 100, 0.5), "C").replace("HETATM", "ATOM  ") for k in range(50)]
    lines += ["ATOM  186a0  H   MOL A   1       1.000   2.000   3.000  1.00  0.00           H\n"]
    lines += ["ATOM  *****  H   MOL AA000       1.500   2.000   3.000  1.00  0.00           h\n", "CONECT    1    2\n"]
    (tmp_path / "a.pdb").write_text("".join(lines))
    frame = read_list(tmp_path / "a.pdb")[0]
    assert frame.get_chemical_formula() == "C50H2"  # mdtraj drops 49 atoms of the same name
    assert len(read_list(tmp_path / "a.pdb", select="element H")[0]) == 2


def test_the_first_of_alternate_locations_is_taken(tmp_path, caplog):
    text = line(1, "N", "ALA", 1, (0, 0, 0), "N")
    for location, x in (("A", 1.5), ("B", 1.6)):
        text += line(2, "CA", "ALA", 1, (x, 0, 0), "C", location) + line(3, "HA", "ALA", 1, (x, 1, 0), "H", location)
    (tmp_path / "a.pdb").write_text(text)
    frame = read_list(tmp_path / "a.pdb")[0]
    assert frame.get_chemical_formula() == "CHN"
    assert frame.positions[1:, 0].tolist() == [1.5, 1.5]
    assert "has alternate locations: the first" in caplog.text


def test_deuterium_has_its_mass(tmp_path):
    (tmp_path / "a.pdb").write_text(line(1, "O", "DOD", 1, (0, 0, 0), "O") + line(2, "D1", "DOD", 1, (1, 0, 0), "D"))
    frame = read_list(tmp_path / "a.pdb")[0]
    assert frame.numbers.tolist() == [8, 1]
    assert frame.get_masses()[1] == pytest.approx(2.014, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "residue", "number"),
    [
        ("CA", "ALA", 6),
        ("CA", "CA", 20),
        ("CAL", "CAL", 20),
        ("CA", "LIG", None),
        ("1HB", "ALA", 1),
        ("HD21", "ASN", 1),
        ("1HB", "LIG", None),
        ("OW", "SOL", 8),
        ("MW", "SOL", None),
        ("NA", "NA+", 11),
        ("NA", "HEM", None),
        ("CL", "CL", 17),
        ("CL", "UNL", None),
        ("CL1", "UNL", None),
        ("Cl1", "UNL", 17),
        ("C12", "UNL", 6),
        ("C1A", "UNL", 6),
        ("SOD", "SOD", 11),
        ("SE", "MSE", None),
        ("12", "LIG", None),
    ],
)
def test_names_tell_an_element_or_nothing(name, residue, number):
    assert element_of(name, residue) == number


def test_elements_of_a_pdb_are_never_guessed(tmp_path):
    (tmp_path / "a.pdb").write_text(model(waters(), elements=False))
    assert read_list(tmp_path / "a.pdb")[0].get_chemical_symbols() == waters().get_chemical_symbols()
    (tmp_path / "b.pdb").write_text(line(1, "CA", "LIG", 1, (0, 0, 0)) + line(2, "C1", "LIG", 1, (2, 0, 0)))
    with pytest.raises(
        InputError, match=r"atom 0 \(CA of LIG 1\) has no element in columns 77-78; accepted: a chemical"
    ):
        read_list(tmp_path / "b.pdb")
    write_frames(tmp_path / "top.xyz", [Atoms("CaC", [[0, 0, 0], [2, 0, 0]])])
    assert read_list(tmp_path / "b.pdb", topology=tmp_path / "top.xyz")[0].numbers.tolist() == [20, 6]
    (tmp_path / "c.pdb").write_text(line(1, "Q", "LIG", 1, (0, 0, 0), "QQ"))
    with pytest.raises(InputError, match="has the element 'QQ'"):
        read_list(tmp_path / "c.pdb")


def gro(atoms: Atoms, box: str, title: str = "water", velocity: float | None = None, residue: str = "SOL") -> str:
    text = f"{title}\n{len(atoms):5d}\n"
    for k, one in enumerate(atoms):
        text += f"{k // 3 + 1:5d}{residue:<5}{NAMES[k % 3]:>5}{k + 1:5d}" + "".join(
            f"{x / 10:8.3f}" for x in one.position
        )
        text += "" if velocity is None else f"{velocity:8.4f}" * 3
        text += "\n"
    return text + box + "\n"


def test_gro_has_frames_boxes_velocities_and_times(tmp_path):
    atoms = waters()
    triclinic = "0.90000 0.80000 0.70000 0.01000 0.02000 0.10000 0.03000 0.20000 0.30000"
    text = gro(atoms, triclinic, "water t= 0.00000 step= 0", 0.25) + gro(atoms, "1.0 1.1 1.2", "t=   2.5", -0.5)
    (tmp_path / "a.gro").write_text(text + "\n")
    frames = read_list(tmp_path / "a.gro")
    assert len(frames) == len(read_frames(tmp_path / "a.gro")) == 2
    np.testing.assert_allclose(frames[0].cell.array, [[9, 0.1, 0.2], [1, 8, 0.3], [2, 3, 7]], atol=1e-12)
    np.testing.assert_allclose(frames[1].cell.lengths(), [10, 11, 12])
    np.testing.assert_allclose(frames[1].positions, atoms.positions, atol=5.1e-3)
    speeds = [frame.get_velocities()[0, 0] / ASE_TIME_FS for frame in frames]
    np.testing.assert_allclose(speeds, [2.5e-3, -5e-3])  # Å/fs
    assert [frame.info["time_fs"] for frame in frames] == [0, 2500]
    assert "0.01 Å" in frames[0].info["lossy"]
    (tmp_path / "b.gro").write_text(gro(atoms, "0.0 0.0 0.0", residue="LIG"))
    frame = read_list(tmp_path / "b.gro")[0]
    assert not frame.pbc.any()
    assert not frame.has("momenta")
    with pytest.raises(InputError, match="the file ends within it"):
        read_list(_cut(tmp_path / "c.gro", text, -70))


def _cut(path, text: str, end: int):
    path.write_text(text[:end])
    return path


def test_chlorine_in_gro_is_no_carbon(tmp_path):
    rows = ["    1CL      CL    1   0.100   0.100   0.100", "    2UNL     CL    2   0.500   0.100   0.100"]
    (tmp_path / "a.gro").write_text("\n".join(["x", "2", *rows, " 2 2 2\n"]))
    with pytest.raises(InputError, match=r"element of atom 1 \(CL of UNL 2\) is not certain"):
        read_list(tmp_path / "a.gro")  # mdtraj and its topologies read two carbons
    write_frames(tmp_path / "top.xyz", [Atoms("ClC", np.eye(3)[:2] * 4)])
    assert read_list(tmp_path / "a.gro", topology=tmp_path / "top.xyz")[0].numbers.tolist() == [17, 6]


@pytest.mark.parametrize("suffix", ["nc", "rst7", "ncrst", "mdcrd", "dcd"])
def test_amber_and_others_through_one_door(tmp_path, suffix, capfd):
    import mdtraj

    atoms = waters()
    (tmp_path / "top.pdb").write_text(model(atoms))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trajectory = mdtraj.load(str(tmp_path / "top.pdb"))
        n_frames = 1 if suffix in ("rst7", "ncrst") else 3
        trajectory = mdtraj.join([trajectory] * n_frames) if n_frames > 1 else trajectory
        trajectory.xyz = np.array([(atoms.positions + k) / 10 for k in range(n_frames)])
        trajectory.time = 0.5 * np.arange(1, n_frames + 1)
        trajectory.unitcell_lengths = np.array([[1.1, 1.2, 1.3]] * n_frames) + 0.01 * np.arange(n_frames)[:, None]
        trajectory.unitcell_angles = np.full((n_frames, 3), 90.0)
        trajectory.save(str(tmp_path / f"a.{suffix}"))
    frames = read_list(tmp_path / f"a.{suffix}", topology=tmp_path / "top.pdb", select="name O or name H1")
    assert len(frames) == len(read_frames(tmp_path / f"a.{suffix}", topology=tmp_path / "top.pdb")) == n_frames
    chosen = [k for k in range(12) if k % 3 < 2]
    for k, frame in enumerate(frames):
        np.testing.assert_allclose(frame.positions, atoms.positions[chosen] + k, atol=6e-4)
        np.testing.assert_allclose(frame.cell.lengths(), np.array([11, 12, 13]) + 0.1 * k, atol=1e-3)
        assert frame.info.get("time_fs") == (None if suffix in ("mdcrd", "dcd") else 500.0 * (k + 1))
    with pytest.raises(InputError, match="with topology=FILE"):
        read_frames(tmp_path / f"a.{suffix}")
    capfd.readouterr()


def dump(columns: str, rows: list[str]) -> str:
    bounds = "ITEM: BOX BOUNDS pp pp pp\n0 9\n0 9\n0 9\n"
    return f"ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n{len(rows)}\n{bounds}ITEM: ATOMS {columns}\n" + "".join(rows)


def test_types_of_lammps_are_no_elements(tmp_path):
    rows = ["2 2 1.0 0.0 0.0\n", "1 1 0.0 0.0 0.0\n"]
    (tmp_path / "a.lammpstrj").write_text(dump("id type x y z", rows) * 2)
    with pytest.raises(InputError, match="types and no column element"):
        read_list(tmp_path / "a.lammpstrj")  # ASE reads hydrogen and helium
    write_frames(tmp_path / "top.xyz", [Atoms("CO", [[0, 0, 0], [1.1, 0, 0]])])
    frames = read_list(tmp_path / "a.lammpstrj", topology=tmp_path / "top.xyz")
    assert [frame.get_chemical_symbols() for frame in frames] == [["C", "O"]] * 2
    assert frames[1].positions[1, 0] == 1.0
    (tmp_path / "b.dump").write_text(dump("id type element x y z", ["1 1 C 0 0 0\n", "2 2 O 1.1 0 0\n"]))
    assert read_list(tmp_path / "b.dump")[0].get_chemical_symbols() == ["C", "O"]


def test_lossy_formats_say_so_once(tmp_path):
    (tmp_path / "a.pdb").write_text(model(waters()) + "END\n" + model(waters()))
    frames = read_frames(tmp_path / "a.pdb")
    with pytest.warns(LossyWarning, match="rounded to 0.001 Å.*forces here are not those of the run") as caught:
        assert len(list(frames)) == 2
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(frames)  # said
        write_frames(tmp_path / "a.xyz", [waters()])
        exact = read_frames(tmp_path / "a.xyz")
        list(exact)
    assert frames.lossy
    assert exact.lossy is None
    with pytest.warns(LossyWarning):
        list(read_frames(tmp_path / "a.pdb").select(lambda index, n_atoms: True))
    write_frames(tmp_path / "a.h5", list(frames))  # what was lost stays lost
    with pytest.warns(LossyWarning):
        read_list(tmp_path / "a.h5")


def test_the_box_that_openmm_gives_to_everything_is_told(tmp_path):
    (tmp_path / "a.pdb").write_text(cryst1(20, 20, 20) + model(waters()))
    with pytest.warns(PlausibilityWarning, match="reporters write for a run without a box too.*--no-pbc"):
        assert read_list(tmp_path / "a.pdb")[0].pbc.all()
    frame = read_list(tmp_path / "a.pdb", pbc=False)[0]
    assert not frame.pbc.any()
    assert not frame.cell.any()
    (tmp_path / "b.pdb").write_text(cryst1(20, 20, 20.1) + model(waters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlausibilityWarning)
        read_list(tmp_path / "b.pdb")


def labelled() -> Atoms:
    atoms = waters()
    atoms.set_cell([9, 9, 9])
    atoms.pbc = True
    atoms.calc = SinglePointCalculator(atoms, energy=-60.0, forces=atoms.positions, stress=np.ones(6))
    return atoms


@pytest.mark.parametrize("suffix", ["xyz", "h5", "traj"])
def test_without_its_box_a_frame_keeps_energy_and_forces(tmp_path, suffix):
    write_frames(tmp_path / f"a.{suffix}", [labelled()])
    whole, bare = (labels_of(read_list(tmp_path / f"a.{suffix}", pbc=pbc)[0]) for pbc in (None, False))
    assert whole["stress"] is not None
    assert bare["stress"] is None
    assert bare["energy"] == -60.0
    np.testing.assert_array_equal(bare["forces"], whole["forces"])
    with pytest.raises(InputError, match="pbc is True; accepted: False"):
        read_frames(tmp_path / f"a.{suffix}", pbc=True)


def test_a_part_has_no_labels_of_the_whole(tmp_path):
    atoms = labelled()
    atoms.set_tags(np.arange(12))
    write_frames(tmp_path / "a.xyz", [atoms, atoms])
    part = read_list(tmp_path / "a.xyz", select="index 3 to 5")[1]
    assert part.arrays["tags"].tolist() == [3, 4, 5]
    assert labels_of(part) == {"energy": None, "forces": None, "stress": None}
    assert part.cell.lengths().tolist() == [9, 9, 9]
    assert read_list(tmp_path / "a.xyz", select="element O")[0].get_chemical_formula() == "O4"


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("not water", "has no names of atoms or residues .water.; accepted: element and index, or topology"),
        ("resname HOH", "has no names"),
        ("name O", "has no names"),
        ("element N", "which no atom fits"),
        ("index 99", "which no atom fits"),
        ("element O and", "which mdtraj cannot parse"),
        ("", "which mdtraj cannot parse|no atom fits"),
    ],
)
def test_selections_that_cannot_be_made_are_refused(tmp_path, select, message):
    write_frames(tmp_path / "a.xyz", [labelled()])
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / "a.xyz", select=select)


def test_names_may_come_from_a_topology_which_must_fit(tmp_path):
    write_frames(tmp_path / "a.h5", [labelled()])
    (tmp_path / "top.pdb").write_text(model(waters()))
    assert len(read_list(tmp_path / "a.h5", topology=tmp_path / "top.pdb", select="water and name O")[0]) == 4
    (tmp_path / "other.pdb").write_text(model(waters()[::-1]).replace("HOH", "LIG"))
    write_frames(tmp_path / "a.xyz", [labelled()])
    with pytest.raises(InputError, match=r"frame 0: has other elements"):
        read_list(tmp_path / "a.xyz", topology=tmp_path / "other.pdb")
    write_frames(tmp_path / "few.xyz", [waters(1)])
    with pytest.raises(InputError, match="12 atoms, but .*few.xyz has 3"):
        read_list(tmp_path / "top.pdb", topology=tmp_path / "few.xyz")


def test_formal_charges_of_a_pdb_are_read(tmp_path):
    lines = [text.ljust(78)[:78] for text in model(waters(1)).splitlines() if text.startswith(("ATOM", "HETATM"))]
    lines[0] += "1-"
    (tmp_path / "ion.pdb").write_text("\n".join([*lines, "END", ""]))
    (atoms,) = read_list(tmp_path / "ion.pdb")
    assert atoms.get_initial_charges().tolist() == [-1.0, 0.0, 0.0]
    (tmp_path / "neutral.pdb").write_text(model(waters(1)))
    assert "initial_charges" not in read_list(tmp_path / "neutral.pdb")[0].arrays


def test_models_with_a_box_beside_models_without_are_told(tmp_path, caplog):
    text = "".join(cryst1(*lengths) + model(waters()) + "ENDMDL\n" for lengths in ((1, 1, 1), (25, 25, 25)))
    (tmp_path / "a.pdb").write_text(text)
    assert [bool(atoms.pbc.all()) for atoms in read_list(tmp_path / "a.pdb")] == [False, True]
    assert "models with a box and models with the dummy" in caplog.text


def short_trajectory(folder, suffix, n=4):
    """Three frames by mdtraj, and the elements beside them."""
    import mdtraj

    atoms = waters(n)
    write_frames(folder / "a.xyz", [atoms])
    topology = mdtraj.Topology()
    residue = topology.add_residue("WAT", topology.add_chain())
    for symbol in atoms.get_chemical_symbols():
        topology.add_atom(symbol, mdtraj.element.Element.getBySymbol(symbol), residue)
    path = folder / f"cut{suffix}"
    mdtraj.Trajectory(np.stack([atoms.positions / 10 + 0.01 * k for k in range(3)]), topology).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::equimd.frames.LossyWarning")
def test_a_cut_trajectory_is_refused(tmp_path):
    path = short_trajectory(tmp_path, ".xtc")
    assert len(read_list(path, topology=tmp_path / "a.xyz")) == 3
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cut.xtc: mdtraj cannot read it"):
        read_list(path, topology=tmp_path / "a.xyz")
    small = short_trajectory(tmp_path, ".xtc", 1)  # of frames of one size, which mdtraj counts by that
    small.write_bytes(small.read_bytes()[:-20])
    with pytest.raises(InputError, match="cut.xtc: mdtraj cannot count its frames"):
        len(read_frames(small, topology=tmp_path / "a.xyz"))


@pytest.mark.filterwarnings("ignore::equimd.frames.LossyWarning")
def test_a_dcd_with_fewer_frames_than_it_states_is_told(tmp_path, caplog):
    path = short_trajectory(tmp_path, ".dcd")
    assert len(read_list(path, topology=tmp_path / "a.xyz")) == 3
    path.write_bytes(path.read_bytes()[:-200])
    assert "header" not in caplog.text
    assert len(read_list(path, topology=tmp_path / "a.xyz")) == 1
    assert "cut.dcd: its header states 3 frames, it holds 1: was it cut?" in caplog.text
