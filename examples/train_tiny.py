"""Train a tiny potential of each family on frames that ASE's EMT labels, in half a minute.

python examples/train_tiny.py [STEPS]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.frames import write_frames
from equimd.training import train
from equimd.training.recipe import make_recipe

MODELS = {
    "equivariant": {"family": "equivariant", "cutoff": 4.0, "n_layers": 1, "l_max": 1, "n_channels": 8},
    "transformer": {"family": "transformer", "cutoff": 4.0, "d_model": 16, "n_gnn_layers": 1, "d_feedforward": 16},
}


def rattled(seed: int) -> Atoms:
    """A rattled copper cell with EMT's energy and forces."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, rng=np.random.default_rng(seed))
    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_frames(folder / "train.xyz", [rattled(seed) for seed in range(64)])
        write_frames(folder / "valid.xyz", [rattled(seed) for seed in range(64, 80)])
        for family, model in MODELS.items():
            data = {"train": "train.xyz", "valid": "valid.xyz", "isolated_atom_energies": {"Cu": 0.0}}
            recipe = make_recipe({"name": family, "model": model, "data": data, "steps": steps}, folder)
            result = train(recipe, folder / family, progress=False)
            print(f"{family}: validation force MAE {1e3 * result.valid.force_mae:.1f} meV/Å")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
