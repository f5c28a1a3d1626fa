"""Two processes against one: what they train, how fast, and what is left when one of them is killed.

    python benchmarks/distributed.py [--steps 20] [--work FOLDER]

The shipped ethanol recipes, as ``torchrun --nproc-per-node=2 -m equimd train`` and as one process with the same batch,
each on one thread: the largest difference of weights after some steps in float64, frames/s in float32; then a training
of two, one of which gets SIGKILL: seconds until the other has ended, and whether one process resumes what it left.
Writes benchmarks/results/distributed.json and the table in benchmarks/README.md. About four minutes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tables import markdown, write_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "distributed.json"
NAMES = ("ethanol-equivariant", "ethanol-transformer")
SPEED_STEPS = 300


def start(name: str, out: Path, n_processes: int, *overrides: str, resume: bool = False) -> subprocess.Popen[str]:
    """A training of a shipped recipe by so many processes."""
    command = [sys.executable, "-m"]
    if n_processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}", "-m"]
    command += ["equimd", "train", str(ROOT / "potentials" / name / "recipe.yaml"), "-o", str(out)]
    for override in ("n_threads=1", "validation.every=1000000", "validation.symmetry_frames=0", *overrides):
        command += ["--set", override]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command += ["--resume"] if resume else []
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a training that must end well."""
    _, errors = process.communicate(timeout=900)
    if process.returncode:
        raise RuntimeError(errors)


def difference(one: Path, other: Path) -> float:
    """Largest difference of weights, relative to the largest weight of the same parameter."""
    from safetensors.torch import load_file

    a, b = (load_file(folder / "state.safetensors") for folder in (one, other))
    names = [name for name in a if name.startswith("weights/") and a[name].numel()]
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-12)) for n in names)


def compare(name: str, work: Path, steps: int) -> dict[str, Any]:
    """Weights after ``steps`` in float64, and frames/s in float32, of one and of two processes."""
    for n in (1, 2):
        finish(start(name, work / f"{name}-{n}", n, f"steps={steps}", "dtype=float64"))
    rates = {}
    for n in (1, 2):
        out = work / f"{name}-speed-{n}"
        finish(start(name, out, n, f"steps={SPEED_STEPS}"))
        rates[n] = json.loads((out / "result.json").read_text(encoding="utf-8"))["frames_per_s"]
    return {
        "difference": difference(work / f"{name}-2", work / f"{name}-1"),
        "frames_per_s": {str(n): rate for n, rate in rates.items()},
    }


def ranks(parent: int) -> list[int]:
    """Processes that torchrun has started, in the order of their ranks."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def kill_one(name: str, work: Path) -> dict[str, Any]:
    """Kill the second process once a state is written; seconds to the end, and a resume by one process."""
    from equimd.models.container import read_tensors
    from equimd.training.state import FORMAT, STATE_FILE

    out = work / "killed"
    settings = ("schedule.kind=constant", "checkpoint.steps=20")  # of a length that may change
    process = start(name, out, 2, "steps=100000", *settings)
    done = 0
    while done < 20:
        time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError(process.communicate()[1])
        if (out / STATE_FILE).exists():
            done = read_tensors(out / STATE_FILE, FORMAT)[0]["progress"]["step"]
    os.kill(ranks(process.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    try:
        process.communicate(timeout=120)
    finally:
        process.kill()  # torchrun takes its processes along
    seconds = time.monotonic() - killed
    done = read_tensors(out / STATE_FILE, FORMAT)[0]["progress"]["step"]
    finish(start(name, out, 1, f"steps={done + 20}", *settings, resume=True))
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "exit_code": process.returncode,
        "step_of_the_state": done,
        "steps_after_the_resume": result["steps"],
        "sessions": result["sessions"],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    for name, found in results["pairs"].items():
        one, two = (found["frames_per_s"][n] for n in ("1", "2"))
        rows.append([f"`{name}`", f"{found['difference']:.1g}", f"{one:.0f}", f"{two:.0f}", f"{two / one:.2f}"])
    difference = f"relative difference after {results['steps']} steps"
    head = ("recipe", difference, "frames/s, one process", "two, together", "times")
    made, killed = results["provenance"], results["killed"]
    return (
        f"{markdown(head, rows)}\n\nOne process killed: the other ended after {killed['seconds']:.1f} s; the state of"
        f" step {killed['step_of_the_state']} was resumed by one process, to step {killed['steps_after_the_resume']}."
        f" {made['processor']}, one thread each, {made['date']}."
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, help="an empty folder; by default a temporary one")
    options = parser.parse_args()
    from equimd.results import provenance, write_text_atomically

    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        results = {
            "schema_version": 1,
            "steps": options.steps,
            "pairs": {name: compare(name, work, options.steps) for name in NAMES},
            "killed": kill_one(NAMES[0], work),
            "provenance": provenance(n_threads=1).model_dump(),
        }
    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("distributed", table(results))


if __name__ == "__main__":
    main()
