"""What the shipped potentials hold: long dynamics, symmetry along it, and agreement between engines.

    python benchmarks/shipped.py [--work FOLDER] [--only PART]

Parts: relabel, nve, langevin, symmetry, water, engines, stress, bfloat16. Dynamics is checkpointed in FOLDER and
resumed, so the command may be interrupted; it belongs to the weights it began with, so give FOLDER anew when they
change. Writes benchmarks/results/shipped.json, part by part, with the hashes of all potentials. About 30 minutes on one
core.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from equimd import EquimdCalculator, equivariance_error
from equimd.analysis.conservation import nve_drift
from equimd.frames import labels_of, read_list
from equimd.md import MDSettings, run_md
from equimd.models.checkpoint import find_potential, list_potentials
from equimd.references import label
from equimd.results import provenance, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "shipped.json"
ETHANOL = ("ethanol-equivariant", "ethanol-transformer")
NVE_STEPS, LANGEVIN_STEPS, STRIDE = 100_000, 200_000, 50  # 50 ps at 0.5 fs; 200 ps at 1 fs
EQUILIBRATION_STEPS = 10_000
WATER_STEPS, WATER_FRAMES = 40_000, 40  # 20 ps at 0.5 fs
SYMMETRY_FRAMES = 40
FINER_DEGREE = 7


def start(name: str) -> Atoms:
    """The structure a potential ships with."""
    return read_list(find_potential(name) / "start.xyz")[0]


def simulate(name: str, output: Path, atoms: Atoms, settings: MDSettings) -> list[Atoms]:
    """Run or resume, and read the frames."""
    resume = output.with_name(output.name + ".state.json").exists()
    result = run_md(atoms, EquimdCalculator(name), settings, output, resume=resume)
    if result.stopped is not None:
        raise RuntimeError(f"{output.name}: {result.stopped}")
    print(f"{output.name}: {result.time_ps:g} ps, {result.mean_temperature_K:.0f} K")
    return read_list(output)


def nve(work: Path) -> dict[str, Any]:
    """Energy drift of ethanol over 50 ps, from a moment of a trajectory at 300 K that has the mean total energy."""
    block = {}
    for name in ETHANOL:
        warm = MDSettings(ensemble="nvt", steps=EQUILIBRATION_STEPS, stride=STRIDE, seed=3)
        second_half = simulate(name, work / f"warm-{name}.h5", start(name), warm)[EQUILIBRATION_STEPS // STRIDE // 2 :]
        energies = np.array([f.get_kinetic_energy() + labels_of(f)["energy"] for f in second_half])
        begin = second_half[int(np.abs(energies - energies.mean()).argmin())]
        settings = MDSettings(ensemble="nve", steps=NVE_STEPS, stride=STRIDE, checkpoint_every=5000)
        frames = simulate(name, work / f"nve-{name}.h5", begin, settings)
        kinetic = np.array([frame.get_kinetic_energy() for frame in frames])
        total = kinetic + [labels_of(frame)["energy"] for frame in frames]
        times = np.arange(len(frames)) * STRIDE * settings.timestep_fs
        drift = nve_drift(times, total, len(begin), kinetic)
        block[name] = drift.model_dump() | {"mean_temperature_K": float(np.mean([f.get_temperature() for f in frames]))}
    return block


def langevin(work: Path) -> dict[str, Any]:
    """Every bond along 200 ps of Langevin dynamics at 500 K: its largest deviation from its mean."""
    name = ETHANOL[0]
    settings = MDSettings(
        steps=LANGEVIN_STEPS, timestep_fs=1.0, temperature_K=500.0, stride=STRIDE, checkpoint_every=5000, seed=5
    )
    frames = simulate(name, work / f"langevin-{name}.h5", start(name), settings)
    distances = frames[0].get_all_distances()
    symbols = np.array(frames[0].get_chemical_symbols())
    heavy = (symbols != "H")[:, None] & (symbols != "H")[None]
    i, j = np.nonzero(np.triu(np.where(heavy, distances < 1.8, distances < 1.25), k=1))
    bonds = np.array([np.linalg.norm(f.positions[i] - f.positions[j], axis=1) for f in frames])
    deviation = np.abs(bonds - bonds.mean(axis=0)).max(axis=0)
    return {
        "n_frames": len(frames),
        "n_bonds": len(i),
        "largest_deviation": float(deviation.max()),
        "mean_temperature_K": float(np.mean([frame.get_temperature() for frame in frames])),
    }


def symmetry(work: Path) -> dict[str, Any]:
    """Equivariance error along the first 10 ps of the NVE runs, in both precisions, and at a finer quadrature."""
    block = {}
    for name in ETHANOL:
        along = read_list(work / f"nve-{name}.h5")[:: 400 // SYMMETRY_FRAMES][:SYMMETRY_FRAMES]
        frames = label(along, "gfn2-xtb")
        single = equivariance_error(EquimdCalculator(name), frames)
        finer = equivariance_error(EquimdCalculator(name), frames, degree=FINER_DEGREE)
        double = equivariance_error(EquimdCalculator(name, dtype="float64"), frames)
        assert single.loss is not None
        assert finer.loss is not None
        block[name] = {
            "n_frames": len(frames),
            "relative_float32": single.force.relative,
            "relative_float64": double.force.relative,
            "rmse_equiv": single.force.rmse_equiv,
            "stderr": single.force.stderr,
            "percent_of_loss": single.loss.percent_of_loss,
            "percent_of_loss_finer": finer.loss.percent_of_loss,
            "degrees": [single.group.degree, finer.group.degree],
        }
    return block


def relabel(work: Path) -> dict[str, Any]:
    """Largest difference between stored and fresh labels on twenty test frames of each set."""
    block = {}
    for folder in sorted({name.rsplit("-", 1)[0] for name in list_potentials()}):
        level = json.loads((ROOT / "data" / folder / "info.json").read_text(encoding="utf-8"))["reference"]
        frames = read_list(ROOT / "data" / folder / "test.xyz.gz")
        stored = frames[:: max(1, len(frames) // 20)][:20]
        fresh = label(stored, level)
        pairs = [(labels_of(a), labels_of(b)) for a, b in zip(stored, fresh, strict=True)]
        block[folder] = {
            "n_frames": len(stored),
            "energy": max(abs(a["energy"] - b["energy"]) for a, b in pairs),
            "force": max(float(np.abs(a["forces"] - b["forces"]).max()) for a, b in pairs),
        }
    return block


def water(work: Path) -> dict[str, Any]:
    """Force errors (eV/Å, RMSE) of the equivariant potential against fresh labels along 20 ps of its own dynamics."""
    name = "water-equivariant"
    settings = MDSettings(steps=WATER_STEPS, stride=WATER_STEPS // WATER_FRAMES, checkpoint_every=4000, seed=7)
    frames = simulate(name, work / f"water-{name}.h5", start(name), settings)[1:]
    errors = np.array(
        [
            np.sqrt(np.mean((labels_of(own)["forces"] - labels_of(fresh)["forces"]) ** 2))
            for own, fresh in zip(frames, label(frames, "gfn1-xtb"), strict=True)
        ]
    )
    quarters = [float(np.sqrt(np.mean(part**2))) for part in np.array_split(errors, 4)]
    return {
        "n_frames": len(frames),
        "duration_ps": WATER_STEPS * settings.timestep_fs / 1000,
        "force_rmse": float(np.sqrt(np.mean(errors**2))),
        "force_rmse_by_quarter": quarters,
        "mean_temperature_K": float(np.mean([f.get_temperature() for f in frames])),
    }


def engines(work: Path) -> dict[str, Any]:
    """Relative differences between ASE and OpenMM: forces, and energy relative to isolated atoms."""
    import openmm
    from openmm import app, unit
    from openmmml import MLPotential

    block = {}
    for name in list_potentials():
        atoms = start(name)
        atoms.rattle(0.02, seed=1)
        topology = app.Topology()
        residue = topology.addResidue("X", topology.addChain())
        for k, symbol in enumerate(atoms.get_chemical_symbols()):
            topology.addAtom(f"{symbol}{k}", app.Element.getBySymbol(symbol), residue)
        if atoms.pbc.any():
            topology.setPeriodicBoxVectors(atoms.cell.array * unit.angstrom)
        for precision, dtype in (("single", "float32"), ("double", "float64")):
            system = MLPotential("equimd", modelPath=name).createSystem(topology, precision=precision)
            context = openmm.Context(
                system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
            )
            context.setPositions(atoms.positions * unit.angstrom)
            state = context.getState(energy=True, forces=True)
            to_ev = 1.0 / (unit.AVOGADRO_CONSTANT_NA * unit.elementary_charge / unit.coulomb * unit.joule)
            energy = float(state.getPotentialEnergy() * to_ev)
            forces = np.asarray(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.angstrom))
            atoms.calc = EquimdCalculator(name, dtype=dtype)
            per_ev = float(1 * unit.kilojoule_per_mole * to_ev)
            table = atoms.calc.potential.isolated_atom_energies
            isolated = sum(table[int(z)] for z in atoms.numbers)
            own = atoms.get_forces()
            block[f"{name} {dtype}"] = {
                "force": float(np.linalg.norm(forces * per_ev - own) / np.linalg.norm(own)),
                "energy": abs(energy - atoms.get_potential_energy()) / abs(atoms.get_potential_energy() - isolated),
            }
    return block


def stress(work: Path) -> dict[str, Any]:
    """Largest difference between stress and finite differences of the energy, water box, cubic and triclinic, eV/Å³."""
    block = {}
    for name in (n for n in list_potentials() if n.startswith("water")):
        for shape in ("cubic", "triclinic"):
            atoms = start(name)
            if shape == "triclinic":
                shear = np.array([[1.0, 0.0, 0.0], [0.12, 1.0, 0.0], [-0.08, 0.1, 1.0]])
                atoms.set_cell(atoms.cell.array @ shear, scale_atoms=True)
            atoms.calc = EquimdCalculator(name, dtype="float64")
            atoms.get_stress()
            analytic = atoms.calc.stress_tensor
            numeric = np.array([[_strain_derivative(atoms, a, b) for b in range(3)] for a in range(3)])
            scale = float(np.abs(numeric).max())
            block[f"{name} {shape}"] = {"largest": float(np.abs(analytic - numeric).max()), "scale": scale}
    return block


def bfloat16(work: Path) -> dict[str, Any]:
    """Transformers with bfloat16 matrix products: force errors (eV/Å, RMSE) against labels, and against float32."""
    block = {}
    for name in (n for n in list_potentials() if n.endswith("transformer")):
        frames = read_list(ROOT / "data" / name.rsplit("-", 1)[0] / "test.xyz.gz")[:100]
        labels = np.concatenate([labels_of(frame)["forces"] for frame in frames])
        calculator, forces = EquimdCalculator(name), {}
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            forces[precision] = np.concatenate(calculator.evaluate(frames).forces)
        torch.set_float32_matmul_precision("highest")
        pairs = {
            "float32": (forces["highest"], labels),
            "bfloat16": (forces["medium"], labels),
            "difference": (forces["medium"], forces["highest"]),
        }
        block[name] = {key: float(np.sqrt(np.mean((a - b) ** 2))) for key, (a, b) in pairs.items()}
    return block


def _strain_derivative(atoms: Atoms, a: int, b: int, step: float = 1e-5) -> float:
    """V⁻¹ ∂E/∂ε_ab by central differences with r' = r (1 + ε)."""
    energies = []
    for sign in (1, -1):
        strain = np.eye(3)
        strain[a, b] += sign * step
        copy = atoms.copy()
        copy.set_cell(atoms.cell.array @ strain)
        copy.positions = atoms.positions @ strain
        copy.calc = atoms.calc
        energies.append(copy.get_potential_energy())
    return (energies[0] - energies[1]) / (2 * step * atoms.get_volume())


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "relabel": relabel,
    "nve": nve,
    "langevin": langevin,
    "symmetry": symmetry,
    "water": water,
    "engines": engines,
    "stress": stress,
    "bfloat16": bfloat16,
}


def weights() -> dict[str, str]:
    """The sha256 of every shipped potential's weights."""
    files = {name: find_potential(name) / "model.safetensors" for name in list_potentials()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def main() -> None:
    """Measure the parts asked for and write what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "shipped")
    parser.add_argument("--only", choices=PARTS, action="append")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"schema_version": 1}
    for name in options.only or PARTS:
        results[name] = PARTS[name](options.work) | {"weights": weights(), "provenance": provenance().model_dump()}
        shown = {k: v for k, v in results[name].items() if k not in ("weights", "provenance")}
        print(name, json.dumps(shown, indent=1))
        write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
