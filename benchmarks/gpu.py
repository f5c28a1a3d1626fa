"""Everything worth measuring on a GPU, in less than nine minutes: correctness, speed, training, peers, kernels.

    python benchmarks/gpu.py [--out FOLDER] [--minutes 8.5] [--device cuda] [--peers FOLDER] [--only PART] [--quick]

Parts: environment, correctness, inference, md, training, peers, convolutions, profile, compile, the most useful first.
Each runs in processes of its own and within its share of the time: what fails, crashes, hangs or is not reached is
recorded as that, and the others go on. Writes gpu.json into FOLDER after every case, atomically, and gpu.md and a table
on the screen at the end. ``--device cpu --quick`` does the same in a minute with tiny sizes: it tells that the code
runs.
"""

import argparse
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_parts import beside_peers, convolutions, correctness, environment, inference, training
from gpu_parts.runner import Part, Run
from gpu_parts.systems import Options
from gpu_parts.table import label, table

from equimd.results import provenance, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
PARTS: dict[str, Part] = {
    "environment": Part(environment.cases, weight=3),
    "correctness": Part(correctness.cases, weight=10, case_seconds=90, n_lanes=8),
    "inference": Part(inference.cases, weight=10),
    "md": Part(inference.md_cases, weight=4),
    "training": Part(training.cases, weight=6),
    "peers": Part(beside_peers.cases, weight=9, case_seconds=100),
    "convolutions": Part(convolutions.cases, weight=5),
    "profile": Part(inference.profile_cases, weight=2),
    "compile": Part(inference.compile_cases, weight=5, case_seconds=120),
}
JUDGED = ("environment", "correctness")
"""Parts whose failures are the command's; what the others cannot do is a result."""


def triton_version() -> str:
    """Which of it is installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


class Ledger:
    """The results as they are known, in a file at every moment, and a line on the screen for each case."""

    def __init__(self, options: Options, seconds: float, out: Path) -> None:
        self.begin, self.path = time.monotonic(), out / "gpu.json"
        self.parts: dict[str, Any] = {}
        self.results: dict[str, Any] = {
            "schema_version": 1,
            "device": options.device,
            "quick": options.quick,
            "limit_s": seconds,
            "seconds": 0.0,
            "provenance": provenance(triton=triton_version()).model_dump(),
            "parts": self.parts,
        }

    @property
    def seconds(self) -> float:
        """Since it was opened."""
        return time.monotonic() - self.begin

    def write(self) -> None:
        """Everything that is known."""
        self.results["seconds"] = round(self.seconds, 1)
        write_text_atomically(self.path, json.dumps(self.results, indent=1, allow_nan=False) + "\n")

    def case(self, case: dict[str, Any]) -> None:
        """One case has ended."""
        self.write()
        said = f"{case['ms']:.4g} ms" if case.get("ms") is not None else case.get("error", "")
        print(f"[{self.seconds:5.0f} s] {label(case)}: {case['state']} {said}", flush=True)

    def measure(self, name: str, options: Options, seconds: float, method: str) -> str:
        """One part, within these seconds; its state."""
        part = Run(PARTS[name], options, time.monotonic() + seconds, method)
        self.parts[name] = {"state": "running", "seconds": 0.0, "cases": part.records}
        self.parts[name] = part.result(self.case)
        self.write()
        print(f"[{self.seconds:5.0f} s] {name}: {self.parts[name]['state']}", flush=True)
        return self.parts[name]["state"]


def run(options: Options, seconds: float, out: Path, only: list[str] | None = None) -> dict[str, Any]:
    """Measure part by part until the time is over; the results, which are in ``out``/gpu.json at every moment."""
    ledger, method = Ledger(options, seconds, out), "fork"
    names = [name for name in PARTS if only is None or name in only]
    for k, name in enumerate(names):
        share = PARTS[name].weight / sum(PARTS[other].weight for other in names[k:])
        state = ledger.measure(name, options, (seconds - ledger.seconds) * share, method)
        if k == 0 and state == "failed":
            method = "spawn"  # something may have used CUDA on import, and a forked process cannot go on with that
            if ledger.measure(name, options, (seconds - ledger.seconds) * share, method) == "failed":
                seconds = 0.0  # there is no such device
    return ledger.results


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; 1 where there is no such device or something is not correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peers", type=Path, help="with a folder for each of nequip, mace, pet; see README.md")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(arguments)
    device = "cuda:0" if given.device == "cuda" else given.device
    options = Options(device, given.quick, given.peers.resolve() if given.peers else None)
    given.out.mkdir(parents=True, exist_ok=True)
    results = run(options, 60 * given.minutes, given.out.resolve(), given.only)
    text = table(results)
    write_text_atomically(given.out / "gpu.md", text + "\n")
    print("\n" + text)
    judged = [results["parts"][name] for name in JUDGED if name in results["parts"]]
    return int(any("failed" in (part["state"], *(case["state"] for case in part["cases"])) for part in judged))


if __name__ == "__main__":
    sys.exit(main())
