"""Measure a calculator that is not ours: accuracy against a reference, equivariance, speed. Here ASE's EMT.

python examples/someone_elses_calculator.py
"""

import numpy as np
from ase.build import molecule
from ase.calculators.emt import EMT

from equimd import equivariance_error, measure_throughput
from equimd.analysis.accuracy import evaluate_accuracy
from equimd.references import label


def main() -> None:
    frames = []
    for seed in range(5):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.05, rng=np.random.default_rng(seed))
        frames.append(atoms)
    labelled = label(frames, "gfn2-xtb")
    calculator = EMT()  # made for metals: expect an honest, large error

    accuracy = evaluate_accuracy(calculator, labelled)
    symmetry = equivariance_error(calculator, labelled)
    speed = measure_throughput(calculator, frames[0])
    print(f"force MAE against GFN2-xTB: {accuracy.force.mae:.2f} eV/Å")
    print(f"force-equivariance error: {symmetry.force.rmse_equiv:.1e} eV/Å", end="")
    print(f", {symmetry.loss.percent_of_loss:.1e} % of the loss")
    print(f"{speed.ms_per_step.median:.2f} ms per MD step, {speed.ns_per_day:.1f} ns/day")


if __name__ == "__main__":
    main()
