"""Decorrelated water configurations from a flexible classical model, as starting points for the reference.

SPC/Fw (Wu, Tepper, Voth, J. Chem. Phys. 124, 024503 (2006)) with particle-mesh Ewald, run with OpenMM; the resting bond
length and angle are those of GFN1-xTB's water molecule.
"""

from dataclasses import dataclass

import numpy as np
import openmm
from ase import Atoms, units
from ase.build import bulk
from openmm import unit
from scipy.spatial.transform import Rotation

MOLECULES = 32
DENSITY_G_PER_CM3 = 1.0
LENGTH = (MOLECULES * 18.015 / units.mol / DENSITY_G_PER_CM3 * 1e24) ** (1 / 3)  # Å
KCAL = 4.184

BOND_NM, BOND_K = 0.09581, 1059.162 * KCAL * 100  # kJ/mol/nm²
ANGLE_RAD, ANGLE_K = np.deg2rad(107.13), 75.90 * KCAL  # kJ/mol/rad²
SIGMA_NM, EPSILON = 0.3165492, 0.1554253 * KCAL
CHARGE_H = 0.41
RATTLES = (0.0, 0.02, 0.05)  # Å
CUTOFF_NM = 0.47  # below half the box


@dataclass(frozen=True)
class ClassicalRun:
    """One trajectory: `burn_in_ps` discarded, then a frame every `interval_ps`."""

    seed: int
    temperature_K: float
    frames: int
    interval_ps: float = 0.2
    burn_in_ps: float = 4.0
    timestep_fs: float = 0.5


def box(seed: int) -> Atoms:
    """32 molecules (O, H, H each) on a face-centred cubic lattice, turned at random, in the cubic cell."""
    rng = np.random.default_rng(seed)
    sites = bulk("Ar", "fcc", a=LENGTH / 2, cubic=True).repeat(2).positions
    half = (np.pi - ANGLE_RAD) / 2
    arm = 10 * BOND_NM * np.array((np.cos(half), np.sin(half), 0.0))
    molecule = np.array(((0.0, 0.0, 0.0), arm, arm * (-1, 1, 1)))
    turns = Rotation.random(MOLECULES, random_state=rng).as_matrix()
    positions = sites[:, None, :] + np.einsum("mab,kb->mka", turns, molecule)
    return Atoms("OHH" * MOLECULES, positions.reshape(-1, 3), cell=[LENGTH] * 3, pbc=True)


def system() -> openmm.System:
    """The OpenMM system of the box."""
    result = openmm.System()
    result.setDefaultPeriodicBoxVectors(*(0.1 * LENGTH * np.eye(3)))
    bonds, angles, pairs = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.NonbondedForce()
    pairs.setNonbondedMethod(openmm.NonbondedForce.PME)
    pairs.setCutoffDistance(CUTOFF_NM)
    pairs.setUseDispersionCorrection(False)
    atoms = ((15.999, -2 * CHARGE_H, EPSILON), (1.008, CHARGE_H, 0.0), (1.008, CHARGE_H, 0.0))
    for molecule in range(MOLECULES):
        o, h1, h2 = (3 * molecule + k for k in range(3))
        for mass, charge, epsilon in atoms:
            result.addParticle(mass)
            pairs.addParticle(charge, SIGMA_NM, epsilon)
        bonds.addBond(o, h1, BOND_NM, BOND_K)
        bonds.addBond(o, h2, BOND_NM, BOND_K)
        angles.addAngle(h1, o, h2, ANGLE_RAD, ANGLE_K)
        for first, second in ((o, h1), (o, h2), (h1, h2)):
            pairs.addException(first, second, 0.0, SIGMA_NM, 0.0)
    for force in (bonds, angles, pairs):
        result.addForce(force)
    return result


def sample(run: ClassicalRun) -> list[Atoms]:
    """Frames of Langevin dynamics, molecules whole, without labels. One thread, so that the seed decides everything."""
    start = box(run.seed)
    integrator = openmm.LangevinMiddleIntegrator(run.temperature_K, 2.0, run.timestep_fs * 1e-3)
    integrator.setRandomNumberSeed(run.seed)
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(system(), integrator, platform, {"Threads": "1", "DeterministicForces": "true"})
    context.setPositions(0.1 * start.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 100.0)
    context.setVelocitiesToTemperature(run.temperature_K, run.seed)
    integrator.step(round(run.burn_in_ps * 1e3 / run.timestep_fs))
    frames = []
    for _ in range(run.frames):
        integrator.step(round(run.interval_ps * 1e3 / run.timestep_fs))
        state = context.getState(getPositions=True)
        frame = start.copy()
        frame.positions = state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
        frames.append(frame)
    return frames


def rattled(frames: list[Atoms], seed: int) -> list[Atoms]:
    """Copies of the frames with every atom moved by a normal deviate; one frame in three stays as it is."""
    rng = np.random.default_rng(seed)
    copies = [frame.copy() for frame in frames]
    for index, copy in enumerate(copies):
        copy.positions += RATTLES[index % len(RATTLES)] * rng.normal(size=copy.positions.shape)
    return copies
