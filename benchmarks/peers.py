"""equimd beside its peers: the same structures, cutoffs and sizes, random weights, alternating in one run.

    python benchmarks/peers.py [--work FOLDER] [--threads 2] [--only ROW]

Makes one environment per peer below FOLDER (their pins clash), starts a worker in each, and lets them take turns, a few
calls at a time, so that what else the machine does hurts all alike. Writes benchmarks/results/peers.json (medians in
ms, all versions) and the table in benchmarks/README.md. About 15 minutes, most of it for the environments.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tables import markdown, write_table

from equimd.results import provenance, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
WORKERS = ROOT / "benchmarks" / "peer_workers"
TORCH = "torch==2.13.0"
PEERS = {"nequip": ["nequip==0.19.1"], "mace": ["mace-torch==0.3.16"], "pet": ["metatrain==2026.4.1"]}
SECONDS_PER_WORKER = 12.0
ROUNDS = 8

# The peers have no nuclear repulsion by default.
EQUIVARIANT = {"family": "equivariant", "cutoff": 5.0, "n_layers": 3, "l_max": 2, "n_channels": 32, "zbl": False}
# PET's default width, number of layers and, by a SwiGLU for atoms' tokens, number of parameters.
TRANSFORMER = {
    "family": "transformer",
    "cutoff": 4.5,
    "d_model": 128,
    "n_heads": 8,
    "n_gnn_layers": 2,
    "n_attention_layers": 2,
    "d_feedforward": 256,
    "d_atom_feedforward": 1450,
    "zbl": False,
}
DENSE = {"avg_num_neighbors": 51.0}
# What is compared: the structure, the work, our model, and the peers with what they are told besides.
ROWS: dict[str, dict[str, Any]] = {
    "192 atoms, energy, forces, stress": {
        "atoms": 192,
        "work": "evaluate",
        "model": EQUIVARIANT | DENSE,
        "peers": {
            "nequip, eager": {},
            "nequip, torch.compile": {"mode": "compile"},
            "nequip, ahead of time": {"mode": "aot"},
            "mace": {},
        },
    },
    "training step, 5 x 27 atoms": {
        "atoms": 27,
        "work": "train",
        "batch": 5,
        "model": EQUIVARIANT | {"avg_num_neighbors": 20.0},
        "peers": {"nequip, eager": {}, "nequip, torch.compile": {"mode": "compile"}},
    },
    "9 atoms, one ASE call": {
        "atoms": 9,
        "work": "ase",
        "model": EQUIVARIANT | {"avg_num_neighbors": 8.0},
        "peers": {"nequip, eager": {}},
    },
    "192 atoms, energy and forces, transformer": {
        "atoms": 192,
        "work": "evaluate",
        "model": TRANSFORMER,
        "peers": {"equimd, bfloat16 products": {"matmul_precision": "medium"}, "pet": {}},
    },
}


class Worker:
    """A model in another process, that is asked for a few calls at a time."""

    def __init__(self, python: Path, script: str, packages: Path | None = None) -> None:
        """``packages``: a folder as ``pip install --target`` makes, whose contents come before all others."""
        variables = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH"}
        environment = {k: v for k, v in os.environ.items() if k not in variables or python == Path(sys.executable)}
        environment["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # for mace
        if packages is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(packages), environment.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [python, WORKERS / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; an error of the worker is an answer too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": "the worker has ended"}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the worker has ended"}

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def environment(work: Path, peer: str) -> Path:
    """The Python of an environment with the peer in it, made where it is missing."""
    python = work / peer / "bin" / "python"
    done = work / peer / "installed.txt"
    wanted = "\n".join([TORCH, *PEERS[peer]])
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", work / peer], check=True)
        for packages in ([TORCH], PEERS[peer]):  # torch first, so that nothing pulls another build
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        done.write_text(wanted)
    return python


def structure(work: Path, n_atoms: int) -> Path:
    """Random positions at the density of water; below 100 atoms on a jittered grid without a cell."""
    rng = np.random.default_rng(0)
    numbers = np.where(np.arange(n_atoms) % 3 == 0, 8, 1)
    length = 12.4 * (n_atoms / 192) ** (1 / 3) if n_atoms >= 100 else 0.0
    if length:
        positions = rng.random((n_atoms, 3)) * length
    else:
        side = int(np.ceil(n_atoms ** (1 / 3)))
        grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:n_atoms]
        positions = 1.5 * (grid + 0.2 * rng.random((n_atoms, 3)))
    path = work / f"{n_atoms}-atoms.npz"
    np.savez(path, numbers=numbers, positions=positions, length=length)
    return path


def measure(work: Path, row: dict[str, Any], threads: int) -> dict[str, Any]:
    """Medians in ms of every contestant of one row, in turns."""
    task = {key: row[key] for key in ("work", "model", "batch") if key in row}
    task |= {"structure": str(structure(work, row["atoms"])), "threads": threads}
    workers = {"equimd": (Worker(Path(sys.executable), "run_ours.py"), task)}
    for name, extra in row["peers"].items():
        peer = name.split(",")[0]
        own = peer == "equimd"
        python, script = (Path(sys.executable), "ours") if own else (environment(work, peer), peer)
        workers[name] = (Worker(python, f"run_{script}.py"), task | extra)
    try:
        return take_turns(workers)
    finally:
        for worker, _ in workers.values():
            worker.stop()


def take_turns(
    workers: dict[str, tuple[Worker, dict[str, Any]]], seconds: float = SECONDS_PER_WORKER
) -> dict[str, dict[str, Any]]:
    """What each worker says of its task, and the median in ms over rounds that take ``seconds`` for each in all."""
    results: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for name, (worker, task) in workers.items():
        results[name] = worker.ask({"setup": task})
        if "error" not in results[name]:
            warm = worker.ask({"run": 3})
            if "error" in warm:
                results[name] = warm
                continue
            share = seconds / ROUNDS / max(warm["seconds"][-1], 1e-4)
            counts[name] = int(np.clip(share, 1, 200))
    samples: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(ROUNDS):
        for name in list(samples):
            answer = workers[name][0].ask({"run": counts[name]})
            if "error" in answer:
                results[name] = answer
                del samples[name]
            else:
                samples[name].append(float(np.median(answer["seconds"])))
    for name, measured in samples.items():
        low, middle, high = np.percentile(measured, [0, 50, 100]).tolist()
        results[name] |= {"ms": 1e3 * middle, "spread": (high - low) / middle}
    own = results["equimd"].get("ms")
    for result in results.values():
        if own and "ms" in result:
            result["ratio"] = result["ms"] / own
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown: a line per contestant and row."""
    lines = []
    for row, contestants in results["rows"].items():
        for name, result in contestants.items():
            ms = f"{result['ms']:.3g}" if "ms" in result else f"does not run: {result['error']}"
            ratio = f"{result['ratio']:.1f}" if "ratio" in result else ""
            lines.append((row, name, f"{result.get('parameters', 0):,}", ms, ratio))
    made = results["provenance"]
    versions = ", ".join([TORCH, *(package for packages in PEERS.values() for package in packages)])
    where = f"{made['processor']}, {results['threads']} threads, float32, {made['date']}; {versions}."
    return markdown(("work", "potential", "parameters", "ms", "times equimd"), lines) + "\n\n" + where


def main() -> None:
    """Measure the rows asked for and write what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=ROWS, action="append")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"schema_version": 1, "rows": {}}
    for name in options.only or ROWS:
        results["rows"][name] = measure(work, ROWS[name], options.threads)
        print(name, json.dumps(results["rows"][name], indent=1), flush=True)
    results |= {"threads": options.threads, "provenance": provenance().model_dump()}
    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("peers", table(results))


if __name__ == "__main__":
    main()
