"""Copies of a system compute what the original computes, after the same checks, or say in one line why not."""

import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import openmm
import pytest
import torch
import toys
from openmm_systems import (
    KJ_PER_MOL_IN_EV,
    SETTINGS,
    SPECIES,
    ask,
    box,
    context_of,
    ethanol,
    save_potentials,
    system_of,
    topology_of,
)
from openmmml import MLPotential

from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.openmm import EquimdForce
from equimd.errors import InputError, KernelWarning
from equimd.models.checkpoint import build_potential, load_checkpoint, save_checkpoint
from equimd.models.transformer import TransformerPotential


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_potentials(tmp_path_factory.mktemp("potentials"))


def by_collective_variable(system: openmm.System) -> openmm.System:
    """The force inside a CustomCVForce, of which every Context makes a copy."""
    out = copy.deepcopy(system)
    for k, force in enumerate(out.getForces()):
        if force.getName() == "EquimdForce":
            collective = openmm.CustomCVForce("x")
            collective.addCollectiveVariable("x", copy.deepcopy(force))
            out.removeForce(k)
            out.addForce(collective)
            return out
    raise AssertionError


WAYS = {
    "xml": lambda system: openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system)),
    "copy": copy.deepcopy,
    "pickle": lambda system: pickle.loads(pickle.dumps(system)),
    "twice": lambda system: copy.deepcopy(copy.deepcopy(system)),
    "collective variable": by_collective_variable,
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_compute_the_same(folder, way, monkeypatch, tmp_path):
    atoms = box()
    # A relative path, then another working folder.
    monkeypatch.chdir(folder)
    system = system_of(atoms, "transformer", precision="double")
    monkeypatch.chdir(tmp_path)
    wanted = ask(context_of(system, atoms.positions))
    energy, forces = ask(context_of(WAYS[way](system), atoms.positions))
    assert energy == pytest.approx(wanted[0], rel=1e-14)  # the collective variable changes units on the way
    np.testing.assert_allclose(forces, wanted[1], rtol=0, atol=1e-14 * np.abs(wanted[1]).max())


def test_xml_holds_no_weights_of_a_named_potential(folder):
    system = system_of(box(), folder / "transformer")
    assert len(openmm.XmlSerializer.serialize(system)) < 20_000


def test_system_is_read_by_another_process_without_an_import_of_ours(folder, tmp_path):
    atoms = ethanol()
    system = system_of(atoms, folder / "equivariant", precision="double")
    wanted = ask(context_of(system, atoms.positions))[0]
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(tmp_path / "x.npy", atoms.positions / 10)
    code = (
        "import numpy, openmm\n"
        "system = openmm.XmlSerializer.deserialize(open('system.xml').read())\n"
        "platform = openmm.Platform.getPlatformByName('Reference')\n"
        "context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)\n"
        "context.setPositions(numpy.load('x.npy'))\n"
        "print(context.getState(energy=True).getPotentialEnergy()._value)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(out.stdout) * KJ_PER_MOL_IN_EV == pytest.approx(wanted, rel=1e-12)


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_kernels(monkeypatch):
    """Compiled networks whose forces are 5 % too large."""
    right = TransformerPotential._evaluate_frozen

    def wrong(self, *args):
        out = right(self, *args)
        return out._replace(forces=1.05 * out.forces)

    monkeypatch.setattr(TransformerPotential, "_evaluate_frozen", wrong)


@pytest.fixture(scope="module")
def sound(folder):
    """Forces of sound kernels."""
    atoms = ethanol()
    return ask(context_of(system_of(atoms, folder / "transformer", precision="double"), atoms.positions))[1]


@pytest.mark.parametrize("way", WAYS)
def test_copies_find_broken_kernels_like_the_original(folder, sound, wrong_kernels, way):
    atoms = ethanol()
    with pytest.warns(KernelWarning, match="is used instead"):
        system = system_of(atoms, folder / "transformer", precision="double", selfCheck=True)
    context = context_of(WAYS[way](system), atoms.positions)
    with pytest.warns(KernelWarning, match="is used instead"):
        forces = ask(context)[1]
    # Kernels have a table of radial functions; they are within 1e-6 of the exact ones in float64.
    np.testing.assert_allclose(forces, sound, rtol=0, atol=1e-5 * np.abs(sound).max())
    # Negative twin: unchecked, the copy has the fault.
    unchecked = ask(
        context_of(WAYS[way](system_of(atoms, folder / "transformer", precision="double")), atoms.positions)
    )
    np.testing.assert_allclose(unchecked[1], 1.05 * sound, rtol=0, atol=1e-5 * np.abs(sound).max())


def test_interpolation_finds_broken_kernels(folder, sound, wrong_kernels):
    atoms = ethanol()
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    options = {"interpolate": True, "precision": "double", "device": "cpu"}
    potential = MLPotential("equimd", modelPath=folder / "transformer")
    with pytest.warns(KernelWarning):
        mixed = potential.createMixedSystem(topology_of(atoms), system, range(len(atoms)), **options)
    context = context_of(mixed, atoms.positions)
    with pytest.warns(KernelWarning):
        forces = ask(context)[1]
    np.testing.assert_allclose(forces, sound, rtol=0, atol=1e-5 * np.abs(sound).max())


def test_copies_repeat_what_the_self_check_refuses():
    compute = EquimdForce(toys.WrongForces(), ethanol().numbers, device="cpu", self_check=True)
    with pytest.raises(openmm.OpenMMException, match="^SelfCheckError: "):
        ask(context_of(copy.deepcopy(_with(compute)), ethanol().positions))


# --- other weights under the same name -------------------------------------------------------------------------------


def changed(folder, what: str) -> None:
    """Another potential at the path of ``transformer``."""
    file = folder / "transformer" / "model.safetensors"
    potential, header = load_checkpoint(file, device="cpu")
    settings, energies = SETTINGS["transformer"], dict(toys.ISOLATED)
    if what == "settings":
        settings = settings.model_copy(update={"cutoff": 3.6})
    if what == "isolated atoms":
        energies[1] += 0.1
    with torch.random.fork_rng():
        other = build_potential(settings, SPECIES, energies)
    other.load_state_dict(potential.state_dict())
    if what == "one weight":
        with torch.no_grad():
            next(other.parameters()).view(-1)[0] += 1e-3
    save_checkpoint(file, other, {"charge": 1.0} if what == "charge" else {})


@pytest.mark.parametrize("what", ["one weight", "settings", "isolated atoms"])
@pytest.mark.parametrize("way", ["xml", "copy", "collective variable"])
def test_another_potential_under_the_same_path_is_refused(tmp_path, way, what):
    folder, atoms = save_potentials(tmp_path), ethanol()
    system = WAYS[way](system_of(atoms, folder / "transformer"))
    changed(folder, "nothing")
    ask(context_of(system, atoms.positions))  # a file that was written again is the same potential
    changed(folder, what)
    with pytest.raises(openmm.OpenMMException, match="^InputError: .*transformer is not the potential that") as caught:
        ask(context_of(copy.deepcopy(system), atoms.positions))
    assert "\n" not in str(caught.value)


def test_a_charge_is_checked_again(tmp_path):
    folder, atoms = save_potentials(tmp_path), ethanol()
    system = system_of(atoms, folder / "transformer", charge=0, multiplicity=1)
    changed(folder, "charge")
    with pytest.raises(openmm.OpenMMException, match="^InputError: total charge is 0 e; .* trained on 1 e"):
        ask(context_of(copy.deepcopy(system), atoms.positions))


def test_a_potential_that_is_gone_is_named(tmp_path):
    folder, atoms = save_potentials(tmp_path), ethanol()
    system = copy.deepcopy(system_of(atoms, folder / "transformer"))
    (folder / "transformer" / "model.safetensors").unlink()
    with pytest.raises(openmm.OpenMMException, match="^InputError: .*transformer"):
        ask(context_of(system, atoms.positions))


# --- objects, and what 0.1.0 wrote -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_a_potential_object_hold_it(way):
    atoms, potential = ethanol(), toys.ToyPotential()
    system = system_of(atoms, potential, precision="double")
    potential.scale.fill_(2.0)  # the user's object is the user's
    copied = WAYS[way](system)
    calc = EquimdCalculator(toys.ToyPotential(), device="cpu", dtype="float64", self_check=False)
    for each in (system, copied):
        energy, forces = ask(context_of(each, atoms.positions))
        assert energy == pytest.approx(calc.get_potential_energy(atoms), rel=1e-12)
        np.testing.assert_allclose(forces, calc.get_forces(atoms), atol=1e-10)


def test_a_potential_object_can_be_interpolated():
    atoms = ethanol()
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    mixed = MLPotential("equimd", modelPath=toys.ToyPotential()).createMixedSystem(
        topology_of(atoms), system, range(9), interpolate=True, precision="double", device="cpu", selfCheck=False
    )
    context = context_of(mixed, atoms.positions)
    calc = EquimdCalculator(toys.ToyPotential(), device="cpu", dtype="float64", self_check=False)
    for share in (1.0, 0.25, 0.0):
        context.setParameter("lambda_interpolate", share)
        assert ask(context)[0] == pytest.approx(share * calc.get_potential_energy(atoms), rel=1e-12)


def test_pickles_of_0_1_0_are_read_and_checked(folder):
    atoms = ethanol()
    wanted = EquimdForce(folder / "transformer", atoms.numbers, device="cpu")
    state = {
        "model": wanted.model,
        "numbers": atoms.numbers,
        "device": "cpu",
        "dtype": "float32",
        "periodic": False,
        "rotation": None,
        "symmetrize": None,
        "skin": 0.5,
        "interaction_energy": False,
        "_evaluator": None,
        "_last": None,
    }
    from equimd.calculators import openmm as where_it_was

    old = where_it_was.EquimdForce.__new__(where_it_was.EquimdForce)
    old.__setstate__(state)
    assert old.self_check is True
    energies = [ask(context_of(_with(compute), atoms.positions))[0] for compute in (wanted, old)]
    assert energies[0] == energies[1]


def _with(compute: EquimdForce) -> openmm.System:
    system = openmm.System()
    for mass in ethanol().get_masses():
        system.addParticle(mass)
    system.addForce(openmm.PythonForce(compute))
    return system


def test_no_potential_at_all_is_refused():
    with pytest.raises(InputError, match="potential is a int"):
        system_of(ethanol(), 5)


def test_sound_kernels_are_not_warned_about(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system = system_of(ethanol(), folder / "transformer", selfCheck=True)
        ask(context_of(copy.deepcopy(system), ethanol().positions))
