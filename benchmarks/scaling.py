"""Time per atom and memory from 200 to 20,000 atoms, random weights, at the density of water.

    python benchmarks/scaling.py [--threads 2]

Each size lives in a process of its own, whose peak of resident memory is its own; all take turns. Writes
benchmarks/results/scaling.json and the table in benchmarks/README.md. About three minutes.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import EQUIVARIANT, TRANSFORMER, structure
from tables import write_table

from equimd.results import provenance, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
SIZES = {"equivariant": (200, 2_000, 20_000), "transformer": (200, 2_000)}
MODELS = {"equivariant": EQUIVARIANT | {"avg_num_neighbors": 51.0}, "transformer": TRANSFORMER}
ROUNDS = 6
_state: dict[str, Any] = {}


def setup(family: str, n_atoms: int, threads: int, folder: Path) -> None:
    """A calculator and its atoms, in the process that measures them."""
    from ase import Atoms

    from equimd import EquimdCalculator
    from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
    from equimd.models.transformer import TransformerPotential, TransformerSettings

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    classes = {
        "equivariant": (EquivariantPotential, EquivariantSettings),
        "transformer": (TransformerPotential, TransformerSettings),
    }
    potential, settings = classes[family]
    model = {key: value for key, value in MODELS[family].items() if key != "family"}
    arrays = np.load(structure(folder, n_atoms))
    length = float(arrays["length"])
    atoms = Atoms(arrays["numbers"], _apart(arrays["positions"], length), cell=[length] * 3, pbc=True)
    atoms.calc = EquimdCalculator(potential(settings(**model), (1, 8), {1: 0.0, 8: 0.0}))
    _state.update(atoms=atoms, moves=np.random.default_rng(0))


def _apart(positions: np.ndarray, length: float) -> np.ndarray:
    """As many positions, on a jittered grid: at random, two of 20,000 would be at one place."""
    n = len(positions)
    side = int(np.ceil(n ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:n]
    return (grid + 0.3 * np.random.default_rng(0).random((n, 3))) / side * length


def measure(count: int) -> tuple[list[float], float]:
    """Seconds of ``count`` evaluations at new positions, and the peak memory in MiB so far."""
    from equimd.calculators.forcefield import process_peak_memory

    atoms, seconds = _state["atoms"], []
    for _ in range(count):
        atoms.positions += _state["moves"].normal(scale=0.003, size=atoms.positions.shape)
        start = time.perf_counter()
        atoms.get_forces()
        atoms.get_stress()
        seconds.append(time.perf_counter() - start)
    return seconds, process_peak_memory()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "scaling")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, Any] = {"schema_version": 1, "threads": options.threads, "rows": {}}
    for family, sizes in SIZES.items():
        pools = {
            n: ProcessPoolExecutor(1, spawn, initializer=setup, initargs=(family, n, options.threads, options.work))
            for n in sizes
        }
        samples: dict[int, list[float]] = {n: [] for n in sizes}
        memory = dict.fromkeys(sizes, 0.0)
        for pool in pools.values():
            pool.submit(measure, 2).result()
        for _ in range(ROUNDS):
            for n, pool in pools.items():
                seconds, memory[n] = pool.submit(measure, max(1, 10_000 // n)).result()
                samples[n].append(float(np.median(seconds)))
        rows = []
        for n in sizes:
            us = 1e6 * float(np.median(samples[n])) / n
            rows.append({"n_atoms": n, "us_per_atom": us, "peak_memory_mib": memory[n]})
            rows[-1]["relative"] = us / rows[0]["us_per_atom"]
            pools[n].shutdown()
        results["rows"][family] = rows
    results["provenance"] = provenance().model_dump()
    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("scaling", table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| family | atoms | µs per atom | relative | peak memory, GB |", "|---|---|---|---|---|"]
    for family, rows in results["rows"].items():
        for row in rows:
            memory = row["peak_memory_mib"] * 2**20 / 1e9
            numbers = f"{row['us_per_atom']:.1f} | {row['relative']:.2f} | {memory:.2f}"
            lines.append(f"| {family} | {row['n_atoms']:,} | {numbers} |")
    made = results["provenance"]
    return "\n".join([*lines, "", f"{made['processor']}, {results['threads']} threads, float32, {made['date']}."])


if __name__ == "__main__":
    main()
