"""Which entries of a frame state a charge or spin, and which frames a potential is not for."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames.electrons import Tally, check_atoms, check_set, electron_kind, stated_electrons

CHARGES = "charge Charge total_charge TOTAL_CHARGE REF_charge dft_total_charge totalCharge net-charge charge_state"
SPINS = "multiplicity Multiplicity spin_multiplicity REF_spin_multiplicity spinMultiplicity pbe0_multiplicity mult"
OTHERS = "charges mulliken_charge partial_charge nuclear_charge core_charge spin_polarized recharge charge_density"


def with_info(**info) -> Atoms:
    atoms = molecule("H2O")
    atoms.info.update(info)
    return atoms


@pytest.mark.parametrize(
    ("names", "kind"),
    [(CHARGES, "charge"), (SPINS, "multiplicity"), ("spin Spin total_spin REF_spin", "spin"), (OTHERS, None)],
)
def test_names(names, kind):
    assert [electron_kind(name) for name in names.split()] == [kind] * len(names.split())


@pytest.mark.parametrize("name", CHARGES.split())
def test_a_charge_is_refused_under_every_name(name):
    with pytest.raises(InputError, match=r"total charge is 1 e.*; the potential was trained on 0 e"):
        check_atoms(with_info(**{name: 1}), {})
    check_atoms(with_info(**{name: 0}), {})
    check_atoms(with_info(**{name: "+1"}), {"charge": 1})


@pytest.mark.parametrize("name", SPINS.split())
def test_a_multiplicity_is_refused_under_every_name(name):
    with pytest.raises(InputError, match=r"spin multiplicity is 3.*; the potential was trained on 1"):
        check_atoms(with_info(**{name: 3}), {})
    check_atoms(with_info(**{name: np.array([3.0])}), {"recipe": {"data": {"multiplicity": 3}}})


def test_every_entry_counts():
    with pytest.raises(InputError, match=r"total charge is -1 e \(REF_charge\)"):
        check_atoms(with_info(charge=0, REF_charge=-1), {})


@pytest.mark.parametrize("value", ["neutral", "nan"])
def test_an_entry_that_is_no_number(value):
    with pytest.raises(InputError, match=r"a.xyz, frame 3: Charge is .*nan|neutral.*; accepted"):
        check_atoms(with_info(Charge=value), {}, "a.xyz, frame 3: ")


@pytest.mark.parametrize(
    ("charges", "stated"),
    [
        ([0.41, 0.41, 0.18], 1.0),  # adds up to a charge of the whole
        ([1, 0, 0], 1.0),
        ([0.334, 0.333, 0.334], 1.0),  # three digits
        ([0.4, -0.2, -0.2], 0.0),
        ([0.4, 0.1, 0.0], None),  # a part of something
    ],
)
def test_initial_charges_state_the_charge_if_they_add_up_to_one(charges, stated):
    atoms = molecule("H2O")
    atoms.set_initial_charges(charges)
    assert [one.value for one in stated_electrons(atoms)] == ([] if stated is None else [stated])
    atoms.info["charge"] = 0
    assert [one.value for one in stated_electrons(atoms)] == [0.0]


def test_charges_of_an_analysis_state_nothing():
    atoms = molecule("H2O")
    atoms.arrays["charges"] = np.array([0.5, 0.3, 0.2])
    atoms.arrays["mbis_charges"] = np.array([1.0, 0.0, 0.0])
    atoms.info["charge"] = [0.5, 0.3, 0.2]  # a number for each atom
    assert stated_electrons(atoms) == []


def test_moments_and_isolated_atoms():
    atoms = molecule("O2")
    assert [one[:2] for one in stated_electrons(atoms)] == [("multiplicity", 3.0)]  # ASE's oxygen is a triplet
    lone = Atoms("O", info={"config_type": "isolated_atom", "spin": 3, "charge": 0})
    assert stated_electrons(lone) == []
    check_atoms(lone, {})


def tally(*frames: Atoms) -> list:
    found = Tally()
    for index, atoms in enumerate(frames):
        found.add(index, atoms, f"frame {index}")
    return found.entries


def test_a_set_is_for_one_charge_and_one_spin():
    def check(*frames, charge=0.0, multiplicity=1.0):
        check_set(tally(*frames), charge, multiplicity, lambda index: f"a.xyz, frame {index}")

    check(with_info(), with_info(charge=0), with_info(REF_charge=0))
    check(with_info(charge=1), with_info(), with_info(total_charge=1, spin=2), charge=1.0, multiplicity=2.0)
    with pytest.raises(InputError, match=r"a.xyz, frame 1: total charge is 1 e, data.charge of .* is 0 \(2 frames"):
        check(with_info(), with_info(charge=1), with_info(charge=1))
    said = r"a.xyz, frame 0 has total charge 0 e \(charge\), a.xyz, frame 2 has 1 e \(REF_charge\)"
    for charge in (0.0, 1.0):
        with pytest.raises(InputError, match=said):
            check(with_info(charge=0), with_info(), with_info(REF_charge=1), charge=charge)
    with pytest.raises(InputError, match=r"frame 1 has 1 \(spin\)"):  # where spin is ever 0, it is 2S
        check(with_info(spin=0), with_info(spin=1))


@pytest.mark.parametrize(("moment", "pbc", "stated"), [(2.0, False, [3.0]), (0.0, False, [1.0]), (2.0, True, [])])
def test_the_moment_that_a_reference_computed_for_a_molecule(moment, pbc, stated):
    """A crystal's moment follows from the structure; a molecule's is the spin that somebody chose."""
    atoms = Atoms("O2", positions=[[0, 0, 0], [0, 0, 1.2]], cell=[9] * 3, pbc=pbc)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, magmom=moment)
    assert [one.value for one in stated_electrons(atoms)] == stated


@pytest.mark.parametrize("name", ["uhf", "nunpaired", "REF_uhf", "2S+1", "chg"])
def test_other_programs_words(name):
    atoms = Atoms("O2", positions=[[0, 0, 0], [0, 0, 1.2]], info={name: 2})
    (one,) = stated_electrons(atoms)
    assert (one.what, one.value) == {"chg": ("charge", 2.0), "2S+1": ("multiplicity", 2.0)}.get(
        name, ("multiplicity", 3.0)
    )
