"""Names and units of labels as files spell them: what is found, what is refused, what is said."""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect

from equimd.errors import InputError
from equimd.frames import LabelKeys, UnitSpec, labels_of, read_frames, read_list
from equimd.units import BOHR, HARTREE, KCAL_PER_MOL

ATOMS = "H 0 0 0 0 0 0.05\nH 0 0 0.74 0 0 -0.05\n"
PLAIN = "2\n{}\nO 0 0 0\nH 0 0 0.97\n"


def write(path, comment: str, forces: str = "forces", frames: int = 1):
    path.write_text(f"2\n{comment} Properties=species:S:1:pos:R:3:{forces}:R:3\n{ATOMS}" * frames)
    return path


@pytest.mark.parametrize("lattice", ["Lattice", "lattice", "LATTICE"])
@pytest.mark.parametrize("pbc", ["pbc", "PBC", "Pbc"])
@pytest.mark.parametrize("properties", ["Properties", "properties", "PROPERTIES"])
def test_cell_and_columns_are_found_in_any_case(tmp_path, lattice, pbc, properties):
    path = write(
        tmp_path / "a.xyz", f'{lattice}="5 0 0 0 6 0 0 0 7" {pbc}="T F T" Virial="1 0 0 0 1 0 0 0 1" ENERGY=-1'
    )
    path.write_text(path.read_text().replace("Properties", properties))
    atoms = read_list(path)[0]
    assert atoms.cell.lengths().tolist() == [5, 6, 7]
    assert atoms.pbc.tolist() == [True, False, True]
    assert atoms.info == {"stress_from": "virial"}
    labels = labels_of(atoms)
    assert labels["energy"] == -1.0
    np.testing.assert_allclose(labels["stress"], -np.eye(3) / 210)


def test_a_cell_under_another_name_is_not_dropped(tmp_path):
    with pytest.raises(InputError, match="has cell= and no Lattice"):
        read_list(write(tmp_path / "a.xyz", 'cell="5 0 0 0 5 0 0 0 5"'))


@pytest.mark.parametrize("suffix", [".traj", ".db", ".xyz"])
def test_two_cases_of_one_name_must_agree_in_every_format(tmp_path, suffix):
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])
    for second, refused in ((-1.0, False), (-2.0, True)):
        atoms.info = {"dft_energy": -1.0, "DFT_energy": second}
        path = tmp_path / f"{second}{suffix}"
        if suffix == ".db":
            with connect(path) as database:
                database.write(atoms, data=atoms.info)
        else:
            ase.io.write(path, atoms)
        if refused:
            with pytest.raises(InputError, match="'dft_energy' and 'DFT_energy' differ"):
                read_list(path)
        else:
            assert labels_of(read_list(path)[0])["energy"] == -1.0


CP2K = [
    " i =        0, time =        0.000, E =       -17.1643447508",
    " i =        5, E =       -17.1643447508",
    'Lattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:pos:R:3 pbc="T T T" Step=20 Time=10.000 Energy=-17.1643447508',
]


@pytest.mark.parametrize("comment", CP2K)
def test_energies_of_cp2k_are_in_hartree(tmp_path, comment, caplog):
    path = tmp_path / "water-pos-1.xyz"
    path.write_text(PLAIN.format(comment) * 3)
    frames = read_frames(path)
    for _ in range(2):
        assert labels_of(next(iter(frames)))["energy"] == pytest.approx(-17.1643447508 * HARTREE, rel=1e-12)
    assert caplog.text.count("in Hartree") == 1
    given = read_list(path, units=UnitSpec(energy="Hartree"))[0]
    assert labels_of(given)["energy"] == pytest.approx(-17.1643447508 * HARTREE, rel=1e-12)
    with pytest.raises(InputError, match="gives the energy in Hartree, but energies are read in eV; accepted"):
        read_list(path, units=UnitSpec())
    path.rename(tmp_path / "water-frc-1.xyz")
    with pytest.raises(InputError, match="forces or velocities in the place of positions"):
        read_list(tmp_path / "water-frc-1.xyz")


@pytest.mark.parametrize(
    ("comment", "energy", "said"),
    [
        ("Properties=species:S:1:pos:R:3 E=-31.5", -31.5, "'E' of an entry of this name is taken as eV"),
        ("Energy = -31.5", -31.5, "'Energy' of a comment line that is not extended XYZ is taken as eV"),
        ("Properties=species:S:1:pos:R:3 energy=-31.5", -31.5, None),
        (" energy: -5.070544445795 gnorm: 0.000325 xtb: 6.4.0", None, None),
        ("Coordinates from ORCA-job water E -76.32", None, None),
    ],
)
def test_what_is_taken_as_ev_without_a_unit_is_said(tmp_path, comment, energy, said, caplog):
    (tmp_path / "a.xyz").write_text(PLAIN.format(comment))
    assert labels_of(read_list(tmp_path / "a.xyz")[0])["energy"] == energy
    assert (said in caplog.text) if said else not caplog.text
    caplog.clear()
    read_list(tmp_path / "a.xyz", units=UnitSpec())
    assert not caplog.text


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("energy=-1 energy_unit=Hartree", "energy_unit=Hartree says hartree, but the unit of energy is eV"),
        ('energy=-1 units="kcal/mol"', "says kcal/mol"),
        ("energy=-1 forces_unit=Ha/Bohr", "says ha"),
        ("energy=-1 forces_unit=eV/Bohr", "says bohr, but the unit of length is Å"),
        ("energy=-1 length_unit=nm", "says nm"),
        ("energy=-1 stress_unit=GPa", "says gpa"),
        ("energy = -1 Hartree", "'Hartree' says hartree"),
        ("energy=-1 a.u.", "says a.u."),
    ],
)
def test_units_that_a_frame_states_are_not_overruled(tmp_path, comment, message):
    with pytest.raises(InputError, match=r"a.xyz, frame 0: .*" + message):
        read_list(write(tmp_path / "a.xyz", comment))


@pytest.mark.parametrize(
    "comment", ["energy_unit=eV", "units=metal", 'energy_units="ev"', "Au", "forces_units=eV/Å", "ha=1"]
)
def test_units_that_agree_or_are_none_change_nothing(tmp_path, comment):
    assert labels_of(read_list(write(tmp_path / "a.xyz", "energy=-1 " + comment))[0])["energy"] == -1.0


@pytest.mark.parametrize(
    ("named", "units", "said"),
    [
        ({"energy": "energy_Ha"}, UnitSpec(energy="Hartree"), "'energy_Ha' says ha"),
        ({"energy": "total_energy_kcal"}, UnitSpec(energy="kcal/mol"), "'total_energy_kcal' says kcal"),
        ({"energy": "energyHartree"}, UnitSpec(energy="Hartree"), "says hartree"),
        ({"forces": "forces_Ha_Bohr"}, UnitSpec(force_energy="Hartree", force_length="Bohr"), "says ha"),
        ({"stress": "stress_GPa"}, UnitSpec(stress="GPa"), "says gpa"),
    ],
)
def test_a_name_that_says_a_unit_is_read_in_it_or_not_at_all(tmp_path, named, units, said):
    label, key = next(iter(named.items()))
    entry = {"energy": f"{key}=-2", "stress": f'{key}="1 0 0 0 1 0 0 0 1" Lattice="9 0 0 0 9 0 0 0 9"'}.get(
        label, "x=1"
    )
    path = write(tmp_path / "a.xyz", entry, key if label == "forces" else "forces")
    for given in (None, UnitSpec()):
        with pytest.raises(InputError, match=said):
            read_list(path, units=given, keys=LabelKeys(**named))
    value = labels_of(read_list(path, units=units, keys=LabelKeys(**named))[0])[label]
    factor = {"energy": -2 * units.energy_factor, "forces": 0.05 * units.force_factor}.get(label, units.stress_factor)
    assert np.max(np.abs(value)) == pytest.approx(abs(factor), rel=1e-12)


def test_units_have_their_sizes():
    assert UnitSpec(energy="kcal/mol").energy_factor == KCAL_PER_MOL
    assert UnitSpec(force_energy="Hartree", force_length="Bohr").force_factor == HARTREE / BOHR


@pytest.mark.parametrize("suffix", [".xyz", ".traj", ".db", ".npz"])
def test_a_name_that_no_frame_has_is_refused_with_the_near_one(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]], info={"REF_energy": -1.0})
    if suffix == ".npz":
        np.savez(path, z=atoms.numbers, R=atoms.positions[None], REF_energy=[-1.0])
    elif suffix == ".db":
        with connect(path) as database:
            database.write(atoms, data=atoms.info)
    else:
        ase.io.write(path, [atoms, Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])])
    message = "has 'REF_enregy', the key of energy; accepted: a name that is there, such as 'REF_energy'"
    for stride in (1, 2):
        with pytest.raises(InputError, match=message.replace("has", "(has|array is)")):
            read_list(path, keys=LabelKeys(energy="REF_enregy"), units=UnitSpec(), stride=stride)
    read = read_list(path, keys=LabelKeys(energy="REF_energy"), units=UnitSpec())
    assert labels_of(read[0])["energy"] == -1.0


def test_a_name_that_only_frames_have_that_are_stepped_over_is_no_mistake(tmp_path):
    path = write(tmp_path / "a.xyz", "x=1", frames=3)
    path.write_text(path.read_text() + write(tmp_path / "b.xyz", "REF_energy=-1").read_text())
    keys = LabelKeys(energy="REF_energy", stress="none")
    assert len(read_list(path, keys=keys, stride=2)) == 2
    with pytest.raises(InputError, match="no frame has 'REF_stress'"):
        read_list(path, keys=LabelKeys(stress="REF_stress"), stride=2)


def test_six_numbers_of_a_stress_are_in_the_order_that_is_asked_for(tmp_path):
    path = write(tmp_path / "a.xyz", 'Lattice="9 0 0 0 9 0 0 0 9" stress=".1 .2 .3 .4 .5 .6" energy=-1')
    orders = {"ase": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "vasp": (0.1, 0.2, 0.3, 0.5, 0.6, 0.4)}  # xx yy zz yz xz xy
    for voigt, (xx, yy, zz, yz, xz, xy) in orders.items():
        stress = labels_of(read_list(path, keys=LabelKeys(voigt=voigt, stress="stress"))[0])["stress"]
        np.testing.assert_allclose(stress, [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], rtol=1e-12)


@pytest.mark.parametrize(
    "comment", ["# CELL(abcABC): 9 9 9 90 90 90 Step: 0 Bead: 0 positions{atomic_unit} cell{atomic_unit}"]
)
def test_comment_lines_of_ipi_are_refused(tmp_path, comment):
    (tmp_path / "a.xyz").write_text(PLAIN.format(comment))
    with pytest.raises(InputError, match="i-PI's, whose cell and units are not read"):
        read_list(tmp_path / "a.xyz")


def test_a_free_energy_is_kept_beside_the_energy_and_in_its_unit(tmp_path):
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, free_energy=-1.5, energies=[-0.5, -0.5])
    ase.io.write(tmp_path / "a.xyz", atoms)
    results = read_list(tmp_path / "a.xyz", units=UnitSpec(energy="Hartree"))[0].calc.results
    assert results["free_energy"] == pytest.approx(-1.5 * HARTREE)
    np.testing.assert_allclose(results["energies"], -0.5 * HARTREE)
