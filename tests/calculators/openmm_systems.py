"""Structures, systems and Contexts that the tests of OpenMM share."""

from pathlib import Path

import numpy as np
import openmm
import torch
import toys
from ase import Atoms
from ase.build import molecule
from openmm import unit
from openmm.app import Element, Topology
from openmmml import MLPotential

from equimd.calculators.openmm_entry import EquimdPotentialImplFactory
from equimd.models.checkpoint import build_potential, list_potentials, save_checkpoint
from equimd.models.equivariant import EquivariantSettings
from equimd.models.transformer import TransformerSettings

KJ_PER_MOL_IN_EV = 0.010364269656262  # independent of equimd.units
SPECIES = (1, 6, 8)
SETTINGS = {
    "equivariant": EquivariantSettings(n_layers=2, n_channels=4, l_max=2, cutoff=3.5, avg_num_neighbors=10.0),
    "transformer": TransformerSettings(d_model=16, n_heads=2, d_feedforward=16, cutoff=3.5),
}
PRECISION = {"single": "float32", "double": "float64"}
TOLERANCE = {"single": 1e-6, "double": 1e-10}


def save_potentials(folder: Path, seed: int = 1) -> Path:
    """Put a small potential of each family into a folder."""
    for name, settings in SETTINGS.items():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            (folder / name).mkdir(exist_ok=True)
            potential = build_potential(settings, SPECIES, toys.ISOLATED)
        save_checkpoint(folder / name / "model.safetensors", potential, {})
    return folder


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, rng=np.random.default_rng(0))
    return atoms


def box() -> Atoms:
    """Four molecules in a reduced triclinic box, shorter in one direction than twice the cutoff."""
    cell = np.array([[6.5, 0.0, 0.0], [1.5, 6.0, 0.0], [-0.7, 0.8, 6.2]])
    atoms = Atoms(cell=cell, pbc=True)
    for k, shift in enumerate(([0.5, 0.5, 0.5], [3.7, 0.8, 3.0], [1.0, 3.6, 3.4], [3.9, 3.8, 0.4])):
        water = molecule("H2O")
        water.rotate(40.0 * k, "x")
        water.positions += shift
        atoms += water
    return atoms


def topology_of(atoms: Atoms) -> Topology:
    topology = Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for number in atoms.numbers:
        topology.addAtom("A", Element.getByAtomicNumber(int(number)), residue)
    if atoms.pbc.any():
        topology.setPeriodicBoxVectors((atoms.cell.array / 10) * unit.nanometer)
    return topology


def context_of(system: openmm.System, positions: np.ndarray) -> openmm.Context:
    # The reference platform computes in double precision; the others would round forces to single.
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.0005), platform)
    context.setPositions(positions / 10)
    return context


def ask(context: openmm.Context) -> tuple[float, np.ndarray]:
    """Energy in eV and forces in eV/Å."""
    state = context.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * KJ_PER_MOL_IN_EV
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return energy, forces * KJ_PER_MOL_IN_EV / 10


def system_of(atoms, model, **options) -> openmm.System:
    options = {"device": "cpu", "selfCheck": False} | options
    return MLPotential("equimd", modelPath=model).createSystem(topology_of(atoms), **options)


def isolated(atoms: Atoms) -> float:
    return sum(toys.ISOLATED[int(z)] for z in atoms.numbers)


# By the entry points where equimd is installed; by hand where it only lies on the path.
for _name in ("equimd", *list_potentials()):
    MLPotential.registerImplFactory(_name, EquimdPotentialImplFactory())
