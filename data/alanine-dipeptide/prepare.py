"""Make the alanine-dipeptide data set: GFN2-xTB energies and forces along GFN2-xTB dynamics of ACE-ALA-NME in vacuum.

`python data/alanine-dipeptide/prepare.py` makes every file of this folder but the README; half an hour or more
on two cores.
"""

import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.optimize import BFGS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sampling import Run, arguments, describe, save, summary, trajectories

from equimd.references import reference_calculator

HERE = Path(__file__).resolve().parent
REFERENCE = "gfn2-xtb"

# Atom order and internal coordinates of N-acetyl-L-alanine-N'-methylamide: element; bonded atom and distance (Å);
# angle atom and angle (deg); dihedral atom and dihedral (deg). Standard peptide geometry, both peptide bonds trans.
# "phi" and "psi" are filled in; the offsets keep the L configuration of the alpha carbon.
Z_MATRIX = (
    ("H", 0, 0.00, 0, 0.0, 0, 0.0),
    ("C", 0, 1.09, 0, 0.0, 0, 0.0),
    ("H", 1, 1.09, 0, 109.5, 0, 0.0),
    ("H", 1, 1.09, 0, 109.5, 2, 120.0),
    ("C", 1, 1.51, 0, 109.5, 2, -120.0),
    ("O", 4, 1.23, 1, 121.0, 0, 0.0),
    ("N", 4, 1.34, 1, 116.0, 5, 180.0),
    ("H", 6, 1.01, 4, 119.0, 1, 0.0),
    ("C", 6, 1.45, 4, 122.0, 1, 180.0),
    ("H", 8, 1.10, 6, 109.5, 4, ("phi", 120.0)),
    ("C", 8, 1.53, 6, 109.5, 4, ("phi", -120.0)),
    ("H", 10, 1.09, 8, 109.5, 6, 60.0),
    ("H", 10, 1.09, 8, 109.5, 6, 180.0),
    ("H", 10, 1.09, 8, 109.5, 6, 300.0),
    ("C", 8, 1.52, 6, 111.0, 4, ("phi", 0.0)),
    ("O", 14, 1.23, 8, 121.0, 6, ("psi", 180.0)),
    ("N", 14, 1.34, 8, 116.0, 6, ("psi", 0.0)),
    ("H", 16, 1.01, 14, 119.0, 8, 0.0),
    ("C", 16, 1.45, 14, 122.0, 8, 180.0),
    ("H", 18, 1.09, 16, 109.5, 14, 60.0),
    ("H", 18, 1.09, 16, 109.5, 14, 180.0),
    ("H", 18, 1.09, 16, 109.5, 14, 300.0),
)

# Backbone conformers (phi, psi) in degrees that trajectories start from. The barrier at phi = 0 is rarely crossed in a
# few picoseconds, so the side of positive phi is given starts of its own.
CONFORMERS_DEG = {
    "C7eq": (-80.0, 70.0),
    "C5": (-155.0, 160.0),
    "C7ax": (70.0, -60.0),
    "alphaR": (-75.0, -30.0),
    "PII": (-70.0, 150.0),
    "alphaL": (60.0, 40.0),
    "beta2": (-130.0, 20.0),
    "positive-C5": (70.0, 170.0),
}

# "early" is for training, too, and not equilibrated: conformers left within a picosecond are hardly in "train". More of
# its trajectories start at positive phi (third, sixth and eighth conformer), of which there are fewer.
EARLY = [*range(64), *(k for k in range(64, 128) if k % 8 in (2, 5, 7))]
SPLITS = {
    "early": [Run(REFERENCE, 5000 + k, 500.0, frames=40, interval=20, burn_in=200) for k in EARLY],
    "train": [Run(REFERENCE, 1000 + k, 500.0, frames=120, interval=20, burn_in=1000) for k in range(56)],
    "valid": [Run(REFERENCE, 2000 + k, 500.0, frames=50, interval=20, burn_in=1000) for k in range(6)],
    "test": [Run(REFERENCE, 3000 + k, 500.0, frames=50, interval=20, burn_in=1000) for k in range(10)],
    "hot": [Run(REFERENCE, 4000 + k, 800.0, frames=50, interval=40, timestep_fs=0.5, burn_in=2000) for k in range(6)],
}


def build(phi_deg: float, psi_deg: float) -> Atoms:
    """The molecule with the given backbone dihedrals and standard bond lengths and angles."""
    positions = np.zeros((len(Z_MATRIX), 3))
    for i, (_, bonded, distance, angled, angle_deg, turned, dihedral) in enumerate(Z_MATRIX):
        if i == 0:
            continue
        if isinstance(dihedral, tuple):
            dihedral = {"phi": phi_deg, "psi": psi_deg}[dihedral[0]] + dihedral[1]
        angle, turn = np.deg2rad(180.0 - angle_deg), np.deg2rad(dihedral)
        b, a = positions[bonded], positions[angled]
        if i == 1:
            positions[i] = (0.0, 0.0, distance)
            continue
        d = positions[turned] if i > 2 else np.array((1.0, 0.0, 0.0))
        e = (b - a) / np.linalg.norm(b - a)
        n = np.cross(a - d, e)
        n /= np.linalg.norm(n)
        m = np.cross(n, e)
        direction = np.array((np.cos(angle), np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn)))
        positions[i] = b + distance * (direction @ np.array((e, m, n)))
    return Atoms([row[0] for row in Z_MATRIX], positions)


def relaxed(atoms: Atoms, fmax: float, steps: int) -> Atoms:
    """The molecule after at most `steps` steps of relaxation, centred on its centre of mass."""
    atoms = atoms.copy()
    atoms.calc = reference_calculator(REFERENCE)
    BFGS(atoms, logfile=None).run(fmax=fmax, steps=steps)
    atoms.positions -= atoms.get_center_of_mass()
    atoms.calc = None
    return atoms


def main() -> None:
    """Run the trajectories of all splits and write the files."""
    options = arguments(HERE, "Make the alanine-dipeptide data set.").parse_args()
    # A few steps relax bonds and angles but leave the molecule in its backbone conformer.
    starts = [relaxed(build(*angles), fmax=0.5, steps=20) for angles in CONFORMERS_DEG.values()]
    runs = [run for split in SPLITS.values() for run in split]
    results = iter(trajectories([starts[run.seed % 1000 % len(starts)] for run in runs], runs, options.processes))
    splits = {name: [frame for _ in split for frame in next(results)] for name, split in SPLITS.items()}
    info = describe(REFERENCE, starts[0].numbers, {name: summary(split) for name, split in SPLITS.items()})
    info["conformers_deg"] = CONFORMERS_DEG
    save(options.out, info, splits, relaxed(starts[0], fmax=0.005, steps=500), options.force)


if __name__ == "__main__":
    main()
