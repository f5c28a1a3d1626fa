"""Alanine dipeptide in OpenMM with a bundled potential, found by openmm-ml through its entry point.

python examples/openmm_md.py [STEPS]
"""

import sys

import openmm
from openmm import app, unit
from openmmml import MLPotential


def main(steps: int) -> None:
    symbols, positions = start()
    topology = app.Topology()
    residue = topology.addResidue("ALA", topology.addChain())
    for k, symbol in enumerate(symbols):
        topology.addAtom(f"{symbol}{k}", app.Element.getBySymbol(symbol), residue)
    system = MLPotential("equimd", modelPath="alanine-dipeptide-equivariant").createSystem(topology)
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 10 / unit.picosecond, 0.5 * unit.femtoseconds)
    simulation = app.Simulation(topology, system, integrator)
    simulation.context.setPositions(positions)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    simulation.reporters.append(
        app.StateDataReporter(sys.stdout, max(1, steps // 10), step=True, potentialEnergy=True, temperature=True)
    )
    simulation.step(steps)


def start() -> tuple[list[str], unit.Quantity]:
    """Symbols and positions of the structure that the potential ships with."""
    from ase.io import read

    from equimd.models.checkpoint import find_potential

    atoms = read(find_potential("alanine-dipeptide-equivariant") / "start.xyz")
    return atoms.get_chemical_symbols(), atoms.positions * unit.angstrom


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
