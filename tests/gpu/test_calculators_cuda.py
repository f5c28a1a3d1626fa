"""Calculators with device "cuda" against the CPU: single frames, batches, rotated copies, dynamics, OpenMM."""

import numpy as np
import pytest
import torch
import toys
from ase import Atoms, units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet

from equimd.analysis.throughput import TimingSettings, measure_throughput
from equimd.calculators.ase import EquimdCalculator
from equimd.errors import InputError
from equimd.models.checkpoint import build_potential, save_checkpoint
from equimd.models.equivariant import EquivariantSettings
from equimd.models.transformer import TransformerSettings
from equimd.rotations import random_rotations

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS = {
    "equivariant": EquivariantSettings(n_layers=2, n_channels=8, cutoff=4.0, avg_num_neighbors=15.0),
    "transformer": TransformerSettings(d_model=16, n_heads=2, d_feedforward=16, cutoff=4.0),
}
# Of forces of some eV/Å, in eV/Å: rounding, and on the CPU in float64 the tables of radial functions.
EQUAL = {"float32": 2e-5, "float64": 1e-8}


def potential_of(family):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build_potential(SETTINGS[family], (1, 6, 8), toys.ISOLATED)


def calculator(family, device, dtype="float64", **options):
    return EquimdCalculator(potential_of(family), device=device, dtype=dtype, **options)


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, rng=np.random.default_rng(0))
    return atoms


def box() -> Atoms:
    """Ethanol in a sheared cell that is smaller than twice the cutoff."""
    atoms = ethanol()
    atoms.set_cell([[6.5, 0.0, 0.0], [1.5, 6.0, 0.0], [-0.7, 0.8, 6.2]])
    atoms.pbc = True
    return atoms


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("atoms", [ethanol(), box()], ids=["molecule", "box"])
@pytest.mark.parametrize("family", SETTINGS)
def test_results_equal_the_cpu(family, atoms, dtype):
    results = []
    for device in (DEVICE, "cpu"):
        atoms.calc = calculator(family, device, dtype)
        atoms.get_forces()
        results.append(atoms.calc.results)
        assert torch.device(atoms.calc.device).type == torch.device(device).type
    own, exact = results
    assert type(own["energy"]) is float
    assert own["forces"].dtype == np.float64
    assert abs(own["energy"] - exact["energy"]) < EQUAL[dtype] * len(atoms)
    assert np.abs(own["forces"] - exact["forces"]).max() < EQUAL[dtype]
    assert ("stress" in own) == ("stress" in exact) == bool(atoms.pbc.any())
    if "stress" in own:
        assert np.abs(own["stress"] - exact["stress"]).max() < EQUAL[dtype]


def test_a_gpu_is_what_auto_means():
    assert torch.device(calculator("equivariant", "auto", self_check=False).device).type == DEVICE


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="CUDA devices here"):
        calculator("equivariant", f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize("family", SETTINGS)
def test_batches_and_rotated_copies_equal_the_cpu(family):
    frames, rotations = [ethanol(), box(), molecule("H2O")], random_rotations(5, seed=1).rotations
    evaluations = []
    for device in (DEVICE, "cpu"):
        calc = calculator(family, device, self_check=False)
        evaluations.append((calc.evaluate(frames), calc.evaluate_rotated(box(), rotations, max_edges=2000)))
    for own, exact in zip(*evaluations, strict=True):
        assert np.abs(own.energies - exact.energies).max() < 1e-7
        for a, b in zip(own.forces, exact.forces, strict=True):
            assert np.abs(a - b).max() < EQUAL["float64"]


@pytest.mark.parametrize("family", SETTINGS)
def test_dynamics_equals_the_cpu(family):
    """Twenty steps with a thin skin, so that the list is rebuilt on the way; errors hardly grow in that time."""
    ends = []
    for device in (DEVICE, "cpu"):
        atoms = box()
        width = np.sqrt(atoms.get_masses() * units.kB * 600)[:, None]
        atoms.set_momenta(width * np.random.default_rng(0).normal(size=(len(atoms), 3)))
        atoms.calc = calculator(family, device, skin=0.1, self_check=False)
        VelocityVerlet(atoms, timestep=0.5 * units.fs).run(20)
        assert atoms.calc._evaluator.list.n_builds > 1
        ends.append(atoms.positions)
    assert np.abs(ends[0] - ends[1]).max() < 1e-7


def test_peak_memory_and_throughput_are_the_devices():
    calc = calculator("equivariant", DEVICE, "float32")
    quick = TimingSettings(warmup_steps=5, warmup_seconds=0.0, block_seconds=0.0)
    result = measure_throughput(calc, box(), settings=quick)
    assert torch.device(result.device).type == DEVICE
    assert 0 < result.peak_memory_mib < 1024
    assert result.ms_per_step.median > 0


@pytest.mark.parametrize("family", SETTINGS)
def test_openmm_equals_the_cpu(family, tmp_path):
    openmm = pytest.importorskip("openmm")
    openmmml = pytest.importorskip("openmmml")
    atoms = ethanol()
    save_checkpoint(tmp_path / "model.safetensors", potential_of(family), {})
    topology = openmm.app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for number in atoms.numbers:
        topology.addAtom("A", openmm.app.Element.getByAtomicNumber(int(number)), residue)
    forces = []
    for device in (DEVICE, "cpu"):
        model = openmmml.MLPotential("equimd", modelPath=str(tmp_path / "model.safetensors"))
        system = model.createSystem(topology, precision="double", device=device, selfCheck=False)
        platform = openmm.Platform.getPlatformByName("Reference")
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
        context.setPositions(atoms.positions / 10)
        unit = openmm.unit.kilojoule_per_mole / openmm.unit.nanometer
        forces.append(context.getState(forces=True).getForces(asNumpy=True).value_in_unit(unit))
    assert np.abs(forces[0] - forces[1]).max() < 1e-5  # of some 1000
