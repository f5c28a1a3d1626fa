"""The rounding of a force field that has no second precision to compare with, estimated from its own predictions."""

from ase import Atoms

from equimd.calculators.forcefield import ForceField
from equimd.contract.structures import Predicted, Structure
from equimd.contract.subject import Rounding, estimate_rounding


def estimate_noise(field: ForceField, frame: Atoms, seed: int = 0) -> Rounding:
    """The rounding of ``field`` at one frame, from 18 evaluations; see ``contract.subject.estimate_rounding``."""

    def predict(structure: Structure) -> Predicted:
        atoms = frame.copy()
        atoms.set_constraint()
        atoms.set_cell(structure.cell, scale_atoms=False)
        atoms.positions = structure.positions
        got = field.evaluate([atoms])
        return Predicted(float(got.energies[0]), got.forces[0], got.stresses[0])

    return estimate_rounding(predict, Structure(frame.positions, frame.numbers, frame.cell.array, frame.pbc), seed)
