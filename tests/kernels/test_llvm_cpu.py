import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from kernel_problems import make_problem

from equimd.kernels import compiled, convolve, llvm_cpu, make_layer_plan, make_topology
from equimd.kernels.codegen import N_POINTERS, kernel_source


def everything(problem):
    out = convolve(*problem.floats, *problem.rest, backend="llvm")
    return (out, *torch.autograd.grad(out.sin().sum(), problem.floats))


@pytest.mark.parametrize("n_atoms", [2, 7])
def test_result_does_not_depend_on_threads(set_threads, monkeypatch, n_atoms):
    problem = make_problem(n_atoms=n_atoms, requires_grad=True)
    set_threads(1)
    expected = everything(problem)
    monkeypatch.setattr(llvm_cpu, "WORK_PER_THREAD", 1)
    for n_threads in (2, 3, 2):
        set_threads(n_threads)
        for a, b in zip(everything(problem), expected, strict=True):
            assert torch.equal(a, b)


def test_split_shares_edges():
    receivers = torch.arange(10).repeat_interleave(torch.arange(10))
    topology = make_topology(torch.zeros_like(receivers), receivers, 10)
    bounds = topology.split(3)
    assert bounds[0] == 0
    assert bounds[-1] == 10
    shares = [
        int(topology.receiver_ptr[b] - topology.receiver_ptr[a]) for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    assert max(shares) <= 15 + 9  # a third of 45 edges, and one node more


def test_groups_of_senders_share_edges_and_keep_the_order_of_receivers():
    generator = torch.Generator().manual_seed(0)
    senders, receivers = (torch.randint(0, 10, (45,), generator=generator) for _ in range(2))
    topology = make_topology(senders, receivers, 10)
    order, bounds = topology.sender_groups(3)
    assert sorted(order.tolist()) == list(range(45))
    assert (bounds[0], bounds[-1]) == (0, 45)
    groups = [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    owned = [set(senders[group].tolist()) for group in groups]
    assert sum(map(len, owned)) == len(set().union(*owned))
    for group in groups:
        assert len(group) <= 15 + int(torch.bincount(senders).max())
        assert bool((receivers[group].diff() >= 0).all())


def test_nan_is_kept():
    problem = make_problem()
    problem.radial[0, 0, 0] = float("nan")
    assert convolve(*problem.floats, *problem.rest, backend="llvm")[problem.receivers[0], 0, 0].isnan()


def test_kernels_are_files_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIMD_CACHE", str(tmp_path))
    compiled.get_kernel("forward", make_layer_plan(0), 3, "float64")
    (file,) = (tmp_path / "kernels").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-8] + b"01234567"):
        file.write_bytes(damaged)
        compiled._compiler.cache_clear()  # a new process
        monkeypatch.setattr(compiled, "_kernels", {})
        monkeypatch.setattr(compiled, "_by_symbol", {})
        compiled.get_kernel("forward", make_layer_plan(0), 3, "float64")
        assert file.read_bytes() == whole


def test_machine_code_lives_as_long_as_its_function(monkeypatch):
    monkeypatch.setattr(compiled, "_by_symbol", {})
    compiled._compiler.cache_clear()
    kernel = compiled.compile_kernel(kernel_source("forward", make_layer_plan(0), 3, "float64"), N_POINTERS)
    owner = weakref.ref(compiled._compiler())
    compiled._compiler.cache_clear()
    gc.collect()
    assert owner() is not None
    compiled._by_symbol.clear()
    del kernel
    gc.collect()
    assert owner() is None


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EQUIMD_CACHE", str(tmp_path / "file"))  # a folder cannot be made there, by root neither
    problem = make_problem(make_layer_plan(0), n_channels=5)
    out = convolve(*problem.floats, *problem.rest, backend="llvm")
    torch.testing.assert_close(out, convolve(*problem.floats, *problem.rest, backend="reference"))


FRESH = """
import sys
import equimd.kernels
import torch
assert "llvmlite" not in sys.modules, "imported before it is used"
assert "e3nn" not in sys.modules, "imported before it is used"
assert "triton" not in sys.modules, "imported before it is used"
from equimd.kernels import llvm_cpu
from kernel_problems import make_problem
import multiprocessing
llvm_cpu.WORK_PER_THREAD = 1
torch.set_num_threads(2)
problem = make_problem()
def total(_=None):
    return float(equimd.kernels.convolve(*problem.floats, *problem.rest, backend="llvm").sum())
expected = total()
if "fork" in multiprocessing.get_all_start_methods():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(total).get(timeout=300) == expected
"""


def test_fresh_process_imports_little_and_forks():
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-W", "ignore", "-c", FRESH]  # the timeouts only end a hang
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert result.returncode == 0, result.stderr
