"""How far from equivariant are the forces of an unconstrained potential along its own dynamics?

python examples/equivariance_along_md.py [STEPS]
"""

import sys

from ase import units
from ase.io import read
from ase.md.langevin import Langevin

from equimd import EquimdCalculator, equivariance_error
from equimd.models.checkpoint import find_potential


def main(steps: int) -> None:
    name = "ethanol-transformer"
    atoms = read(find_potential(name) / "start.xyz")
    atoms.calc = EquimdCalculator(name)
    frames = []
    md = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False)
    md.attach(lambda: frames.append(atoms.copy()), interval=20)
    md.run(steps)

    for label, symmetrize in (("as it is", None), ("averaged over 48 rotations", {"mode": "average", "degree": 3})):
        calculator = EquimdCalculator(name, symmetrize=symmetrize)
        error = equivariance_error(calculator, frames, n_rotations=8, reference="gfn2-xtb")
        print(f"{label}: {1e3 * error.force.rmse_equiv:.3g} ± {1e3 * error.force.stderr:.1g} meV/Å, ", end="")
        print(f"{error.loss.percent_of_loss:.2g} % of the loss")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
