"""Make the ethanol data set: GFN2-xTB energies and forces along GFN2-xTB dynamics of one molecule in vacuum.

`python data/ethanol/prepare.py` makes every file of this folder but the README; it takes about three minutes.
"""

import sys
from pathlib import Path

from ase import Atoms
from ase.build import molecule
from ase.optimize import BFGS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sampling import Run, arguments, describe, save, summary, trajectories

from equimd.references import reference_calculator

HERE = Path(__file__).resolve().parent
REFERENCE = "gfn2-xtb"
HYDROXYL = (0, 1, 2, 3)  # C-C-O-H, see ase.build.molecule("CH3CH2OH")
DIHEDRALS_DEG = (180.0, 60.0, 300.0)

SPLITS = {
    "train": [Run(REFERENCE, 1000 + k, 500.0, frames=500, interval=20) for k in range(16)],
    "valid": [Run(REFERENCE, 2000 + k, 500.0, frames=125, interval=40) for k in range(4)],
    "test": [Run(REFERENCE, 3000 + k, 500.0, frames=125, interval=40) for k in range(8)],
    "hot": [Run(REFERENCE, 4000 + k, 1000.0, frames=125, interval=80, timestep_fs=0.5, burn_in=4000) for k in range(4)],
}


def conformers() -> list[Atoms]:
    """Relaxed anti and two mirror-image gauche conformers."""
    result = []
    for angle in DIHEDRALS_DEG:
        atoms = Atoms(molecule("CH3CH2OH"))
        atoms.set_dihedral(*HYDROXYL, angle, indices=[3])
        atoms.calc = reference_calculator(REFERENCE)
        BFGS(atoms, logfile=None).run(fmax=0.005, steps=300)
        atoms.positions -= atoms.get_center_of_mass()
        atoms.calc = None
        result.append(atoms)
    return result


def main() -> None:
    """Run the trajectories of all splits and write the files."""
    options = arguments(HERE, "Make the ethanol data set.").parse_args()
    starts = conformers()
    runs = [run for split in SPLITS.values() for run in split]
    results = iter(trajectories([starts[run.seed % len(starts)] for run in runs], runs, options.processes))
    splits = {name: [frame for _ in split for frame in next(results)] for name, split in SPLITS.items()}
    info = describe(REFERENCE, starts[0].numbers, {name: summary(split) for name, split in SPLITS.items()})
    save(options.out, info, splits, starts[0], options.force)


if __name__ == "__main__":
    main()
