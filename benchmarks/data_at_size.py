"""What a large data set costs: building its cache of graphs, starting a training from it, and memory over epochs.

    python benchmarks/data_at_size.py [--frames 100000] [--epochs 3] [--work FOLDER]

Frames are those of data/ethanol, rotated and displaced, with the labels of where they came from. Every measurement is
made in a process of its own, with a cache of its own: one that builds (frames are read, graphs are made, kernels are
compiled), one that starts the shipped ethanol recipe's network from the cache, timed from the start of the process to
the end of its first step, and one that trains a small network for some epochs. Memory is what Linux says of the
process: resident, and of that anonymous (the process's own) and of files (mapped, which the system may drop). Writes
benchmarks/results/data_at_size.json and the table in benchmarks/README.md. About five minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tables import markdown, write_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "data_at_size.json"
CUTOFF = 5.0
SHIPPED = {"family": "equivariant", "cutoff": CUTOFF, "n_layers": 3, "l_max": 2, "n_channels": 32}
SMALL = {"family": "equivariant", "cutoff": CUTOFF, "n_layers": 1, "l_max": 1, "n_channels": 4, "radial_width": 8}
DISPLACEMENT = 0.02  # Å, of every coordinate: no two frames are alike


def make_frames(path: Path, n_frames: int) -> None:
    """Write ``n_frames`` of ethanol as extxyz."""
    from equimd.frames import read_list

    source = read_list(ROOT / "data" / "ethanol" / "train.xyz.gz")
    symbols = source[0].get_chemical_symbols()
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for k in range(n_frames):
            atoms = source[k % len(source)]
            rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
            positions = (atoms.positions + rng.normal(scale=DISPLACEMENT, size=(len(atoms), 3))) @ rotation.T
            columns = np.concatenate([positions, atoms.get_forces() @ rotation.T], axis=1)
            file.write(f"{len(atoms)}\nProperties=species:S:1:pos:R:3:forces:R:3 ")
            file.write(f'energy={atoms.get_potential_energy():.10f} pbc="F F F"\n')
            file.writelines(
                f"{symbol} " + " ".join(f"{value:.8f}" for value in row) + "\n"
                for symbol, row in zip(symbols, columns.tolist(), strict=True)
            )


def recipe(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe in the folder of the data."""
    return {
        "name": "data-at-size",
        "model": model,
        "data": {"train": "train.xyz", "valid": str(ROOT / "data" / "ethanol" / "valid.xyz.gz")},
        "batch": {"n_frames": 8},
        "validation": {"symmetry_frames": 0},
        "checkpoint": {"minutes": None},
        "device": "cpu",
        "n_threads": 1,
        **changes,
    }


def memory() -> dict[str, float]:
    """MiB of this process: resident, anonymous, of files, and the largest resident so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    return {name: int(status[key].split()[0]) / 1024 for name, key in names.items()}


def work(values: dict[str, Any], folder: Path, started: float) -> dict[str, Any]:
    """Train as ``values`` say; seconds since ``started`` and memory after the first step and after every epoch."""
    from equimd.training import loop
    from equimd.training.recipe import make_recipe

    seen: dict[str, Any] = {"epochs": []}
    original = loop._Training.step

    def step(self: Any, epoch: Any) -> None:
        original(self, epoch)
        if self.progress.step == 1:
            seen["first_step"] = {"s": time.time() - started, **memory()}
        if self.progress.batch == len(epoch.batches):
            seen["epochs"].append({"s": time.time() - started, **memory()})

    loop._Training.step = step
    with tempfile.TemporaryDirectory(dir=folder) as run:
        loop.train(make_recipe(values, folder), Path(run) / "run", progress=False)
    return {**seen, "cpu_s": time.process_time()}


def measure(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``work`` in a fresh process."""
    environment = os.environ | {
        "EQUIMD_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, __file__, "--worker", json.dumps(values), "--work", str(folder)]
    command += ["--started", str(time.time())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def size(path: Path) -> float:
    """MB of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def run(folder: Path, n_frames: int, n_epochs: int) -> dict[str, Any]:
    """Make the frames and measure."""
    make_frames(folder / "train.xyz", n_frames)
    one_step = recipe(SHIPPED, steps=1)
    results: dict[str, Any] = {"schema_version": 1, "n_frames": n_frames, "file_mb": size(folder / "train.xyz")}
    results["building"] = measure(one_step, folder)
    results["cache_mb"] = size(folder / "cache" / "graphs")
    results["starting"] = measure(one_step, folder)
    # The small network's kernels are compiled by a step of its own, so that its epochs are alike.
    small = {"batch": {"n_frames": 256}, "augmentation": {"rotate": True}}
    measure(recipe(SMALL, steps=1, **small), folder)
    results["training"] = measure(recipe(SMALL, epochs=n_epochs, **small), folder)
    from equimd.results import provenance

    results["provenance"] = provenance(n_threads=1).model_dump()
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    for name, point in (
        ("building the cache, to the end of the first step", results["building"]["first_step"]),
        ("starting from the cache, to the end of the first step", results["starting"]["first_step"]),
        *((f"a small network, end of epoch {k}", one) for k, one in enumerate(results["training"]["epochs"], 1)),
    ):
        rows.append(
            [name, f"{point['s']:.1f}", *(f"{point[key]:.0f}" for key in ("resident", "anonymous", "files", "peak"))]
        )
    head = ("from the start of a process", "s", "resident, MiB", "anonymous", "of files", "peak resident")
    made = results["provenance"]
    sizes = f"extxyz of {results['file_mb']:.0f} MB, cache of {results['cache_mb']:.0f} MB"
    where = f"{made['processor']}, one thread, {made['date']}"
    return f"{markdown(head, rows)}\n\n{results['n_frames']:,} frames of 9 atoms, {sizes}; {where}."


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="an empty folder with room for 300 MB; by default a temporary one")
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(json.loads(options.worker), options.work, options.started)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = run(folder, options.frames, options.epochs)
    if options.print:
        print(table(results))
        return
    from equimd.results import write_text_atomically

    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("data_at_size", table(results))


if __name__ == "__main__":
    main()
