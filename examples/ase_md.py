"""Langevin dynamics of ethanol with a bundled potential, through ASE.

python examples/ase_md.py [STEPS]
"""

import sys

from ase import units
from ase.io import read
from ase.md.langevin import Langevin

from equimd import EquimdCalculator
from equimd.models.checkpoint import find_potential


def main(steps: int) -> None:
    name = "ethanol-equivariant"
    atoms = read(find_potential(name) / "start.xyz")
    atoms.calc = EquimdCalculator(name)
    md = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False)

    def report() -> None:
        print(f"{md.nsteps * 0.5:8.1f} fs  {atoms.get_potential_energy():.4f} eV  {atoms.get_temperature():6.1f} K")

    md.attach(report, interval=max(1, steps // 10))
    md.run(steps)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
