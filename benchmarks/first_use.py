"""From the start of a Python process to the first forces of a shipped potential, compiling included.

    python benchmarks/first_use.py [--checkout FOLDER]

"Cold" is a process with an empty cache of kernels, "warm" one that finds them. Each process imports equimd, makes an
``EquimdCalculator``, reads the potential's ``start.xyz`` and asks for forces. ``--checkout`` measures another
checkout of equimd in turns with this one, for a comparison before and after a change. Writes the table in
benchmarks/README.md and benchmarks/results/first_use.json. About five minutes for each checkout.
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

from equimd.models.checkpoint import list_potentials
from equimd.results import provenance, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "first_use.json"
WARM_ROUNDS = 3
PROGRAM = """
import sys
from ase.io import read
from equimd import EquimdCalculator
from equimd.models.checkpoint import find_potential
atoms = read(find_potential(sys.argv[1]) / "start.xyz")
atoms.calc = EquimdCalculator(sys.argv[1], device="cpu")
print(atoms.get_forces().shape)
"""


def seconds(checkout: Path, name: str, cache: Path) -> float:
    """Wall-clock time of one process."""
    environment = os.environ | {"EQUIMD_CACHE": str(cache), "PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    # The working directory is the cache, so that only PYTHONPATH says which checkout is imported.
    subprocess.run([sys.executable, "-c", PROGRAM, name], check=True, env=environment, cwd=cache, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="another checkout, measured in turns with this one")
    options = parser.parse_args()
    checkouts = {"this": ROOT} | ({} if options.checkout is None else {"other": options.checkout.resolve()})
    rows: list[dict[str, Any]] = []
    for name in list_potentials():
        with tempfile.TemporaryDirectory() as folder:
            caches = {label: Path(folder) / label for label in checkouts}
            for cache in caches.values():
                cache.mkdir()
            cold = {label: seconds(checkout, name, caches[label]) for label, checkout in checkouts.items()}
            warm: dict[str, list[float]] = {label: [] for label in checkouts}
            for _ in range(WARM_ROUNDS):
                for label, checkout in checkouts.items():
                    warm[label].append(seconds(checkout, name, caches[label]))
        for label in checkouts:
            found = {"potential": name, "cold_s": cold[label], "warm_s": float(np.median(warm[label]))}
            print(label, found, flush=True)
            if label == "this":
                rows.append(found)
            else:
                rows[-1] |= {"other_cold_s": cold[label], "other_warm_s": found["warm_s"]}
    results = {"schema_version": 1, "rows": rows, "provenance": provenance().model_dump()}
    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("first_use", table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    rows = [(f"`{r['potential']}`", f"{r['cold_s']:.1f}", f"{r['warm_s']:.1f}") for r in results["rows"]]
    made = results["provenance"]
    return f"{markdown(('potential', 'cold, s', 'warm, s'), rows)}\n\n{made['processor']}, {made['date']}."


if __name__ == "__main__":
    main()
