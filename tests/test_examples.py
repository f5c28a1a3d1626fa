"""Every example runs, in a process of its own and from another folder, and is short enough to be read."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "ase_md.py": (["20"], "fs"),
    "equivariance_along_md.py": (["40"], "of the loss"),
    "train_tiny.py": (["10"], "validation force MAE"),
    "search_optuna.py": (["3"], "best of 3"),
    "someone_elses_calculator.py": ([], "ns/day"),
    "openmm_md.py": (["10"], "Temperature"),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_example(name, tmp_path):
    arguments, expected = RUNS[name]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
