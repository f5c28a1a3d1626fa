"""``benchmarks/gpu.py`` in small on a CPU: every part reports, and what goes wrong stays where it is."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# The command with three more parts: one that cannot begin, one whose cases go wrong in every way, and one that is well.
DRIVER = """
import os, sys, time
import gpu
from gpu_parts.runner import Case, Part, Skip

def broken(options):
    raise ValueError("made to fail")

def raises():
    raise ZeroDivisionError("made to raise")

def skips():
    raise Skip("nothing to see")

def ragged(options):
    calls = {
        "well": lambda: {"ms": 1.0},
        "raises": raises,
        "not a number": lambda: {"ms": float("nan"), "edges": 3},
        "wrong": lambda: {"passed": False},
        "skips": skips,
        "dies": lambda: os._exit(3),
        "hangs": lambda: time.sleep(60),
        "well again": lambda: {"ms": 2.0},
    }
    return [Case({"what": name}, call) for name, call in calls.items()]

def sound(options):
    return [Case({"what": "well"}, lambda: {"ms": 3.0})]

extra = {"broken": Part(broken, 1), "ragged": Part(ragged, 9, case_seconds=4), "sound": Part(sound, 1)}
gpu.PARTS = extra | gpu.PARTS if sys.argv[1] == "first" else gpu.PARTS | extra
sys.exit(gpu.main(sys.argv[2:]))
"""


@pytest.fixture
def modules(monkeypatch):
    """``import gpu`` is the benchmark here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(folder, *arguments, cache=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if cache is None else {"EQUIMD_CACHE": str(cache)})
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    (folder / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(folder / "driver.py"), *arguments]
    command += ["--device", "cpu", "--quick", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (folder / "gpu.json").exists(), done.stderr

    def refuse(name):
        raise AssertionError(f"{name} in the results")

    results = json.loads((folder / "gpu.json").read_text(), parse_constant=refuse)
    assert not list(folder.glob("*.tmp"))
    return results, done


def numbers(value):
    """Every number in a result, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, float) else []


@pytest.mark.slow
def test_every_part_reports_and_faults_stay_where_they_are(tmp_path, request):
    cache = request.config.cache.mkdir("equimd") if hasattr(request.config, "cache") else tmp_path
    results, done = run(tmp_path, "last", "--minutes", "8", cache=cache)  # other tests run beside it
    parts = results["parts"]
    expected = [
        "environment",
        "correctness",
        "inference",
        "md",
        "training",
        "peers",
        "convolutions",
        "profile",
        "compile",
    ]
    assert list(parts) == [*expected, "broken", "ragged", "sound"]
    for name in [*expected, "sound"]:
        assert parts[name]["state"] == "done", parts[name]
        assert any(case["state"] == "done" for case in parts[name]["cases"])
    assert all(case["passed"] for case in parts["correctness"]["cases"])
    assert len(parts["correctness"]["cases"]) > 10
    assert all(math.isfinite(number) for number in numbers(results))
    for name in ("inference", "training", "convolutions", "md", "compile"):
        assert all(case["ms"] > 0 and case["spread"] >= 0 for case in parts[name]["cases"])
    contestants = parts["peers"]["cases"][0]["contestants"]
    assert contestants["equimd"]["ms"] > 0
    assert all("ms" in result or "error" in result for result in contestants.values())
    assert parts["broken"] == {
        "state": "failed",
        "error": parts["broken"]["error"],
        "seconds": parts["broken"]["seconds"],
        "cases": [],
    }
    assert "made to fail" in parts["broken"]["error"]
    check_ragged(parts["ragged"])
    assert done.returncode == 0, done.stderr  # what is judged is correct
    text = (tmp_path / "gpu.md").read_text()
    assert text.strip() in done.stdout
    assert all(f"## {name}: " in text for name in parts)
    assert "made to raise" in text


def check_ragged(part):
    """Each fault is recorded as what it was, and the case after it was measured."""
    cases = {case["what"]: case for case in part["cases"]}
    assert {name: case["state"] for name, case in cases.items()} == {
        "well": "done",
        "raises": "failed",
        "not a number": "failed",
        "wrong": "failed",
        "skips": "skipped",
        "dies": "failed",
        "hangs": "stopped",
        "well again": "done",
    }
    assert "made to raise" in cases["raises"]["error"]
    assert cases["not a number"]["ms"] is None
    assert cases["not a number"]["edges"] == 3
    assert "code 3" in cases["dies"]["error"]
    assert part["state"] == "incomplete"


def test_nothing_is_reached_without_time(modules, tmp_path, capsys):
    import gpu

    assert gpu.main(["--device", "cpu", "--quick", "--minutes", "0", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["state"] for name, part in results["parts"].items()} == dict.fromkeys(gpu.PARTS, "not reached")
    assert "## inference: not reached" in capsys.readouterr().out


def test_a_device_that_is_not_there_ends_it(tmp_path):
    """The first part fails in a forked process and in a fresh one; the others are not reached."""
    results, _ = run(tmp_path, "first", "--only", "broken", "--only", "sound")
    assert results["parts"]["broken"]["state"] == "failed"
    assert results["parts"]["sound"]["state"] == "not reached"


def test_wrong_kernels_are_found(modules, monkeypatch):
    from gpu_parts import correctness
    from gpu_parts.systems import Options

    from equimd import kernels

    options, right = Options("cpu", quick=True), kernels.convolve

    def compare():
        return correctness._compare_convolution(options, (1, False), 4, "float32", "reference")

    def wrong(x, *args, **kwargs):
        return right(x, *args, **kwargs) * (1.001 if x.dtype == torch.float32 else 1.0)

    assert compare()["passed"]
    monkeypatch.setattr(correctness.kernels, "convolve", wrong)
    assert not compare()["passed"]


def test_counted_bytes_and_operations(modules):
    """By hand for l_max 1 and 4 channels: 4 rows, 4 harmonics, 4 paths, 8 rows out, 10 coefficients; 4 bytes each."""
    from gpu_parts.convolutions import _direction
    from gpu_parts.systems import Options

    from equimd.kernels import make_layer_plan

    plan = make_layer_plan(1)
    assert (plan.dim_in, plan.dim_sh, plan.n_paths, plan.dim_out, plan.n_terms) == (4, 4, 4, 8, 10)
    figures = {d: _direction(Options("cpu", quick=True), 27, 4, 1, d, "reference") for d in ("grad_x", "grad_yw")}
    edges = figures["grad_x"]["edges"]
    n_bytes = 4 * (27 * 4 * 4 + edges * 4 + edges * 4 * 4 + 27 * 8 * 4) + 16 * edges
    assert figures["grad_x"]["mb"] == pytest.approx(n_bytes / 1e6)
    assert figures["grad_yw"]["mb"] == pytest.approx((n_bytes + 4 * (edges * 4 + edges * 4 * 4)) / 1e6)
    assert figures["grad_yw"]["gflop"] == 2 * figures["grad_x"]["gflop"] == pytest.approx(4e-9 * 10 * edges * 4)


def test_structures_have_the_density_of_water_and_no_close_pairs(modules):
    from gpu_parts.systems import box, molecule

    for n_atoms in (27, 64, 192, 1000):
        atoms = box(n_atoms)
        assert len(atoms) == n_atoms
        assert n_atoms / atoms.get_volume() == pytest.approx(192 / 12.4**3)
    distances = box(64).get_all_distances(mic=True) + 10 * torch.eye(64).numpy()
    assert distances.min() > 1.0
    assert len(molecule(9)) == 9
    assert not molecule(9).pbc.any()
