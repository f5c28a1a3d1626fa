"""The GPU kernels: on a GPU where there is one, else by triton's interpreter on the CPU, which is slow."""

import dataclasses
import itertools
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from kernel_problems import hessian_vector_product, make_problem, relative_error
from torch.autograd import gradcheck, gradgradcheck

from equimd import kernels
from equimd.kernels import convolve, make_layer_plan, make_plan, triton_gpu
from equimd.kernels.triton_codegen import ROWS_PER_SHARE, make_shares, make_tile
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.selfcheck import self_check

pytestmark = pytest.mark.extra  # the extra "dev" installs triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # of sums of a few hundred products, relative to their norm
LAYERS = [(0, False), (1, False), (2, False), (3, False), (0, True), (1, True), (2, True)]
SMALL = make_plan([(0, 1), (1, -1)], 1, [(0, 1)])


def tiny_problem(plan=SMALL, dtype=torch.float64, n_channels=2, **options):
    return make_problem(plan, dtype, **{"n_atoms": 4, "n_edges": 7, **options}, n_channels=n_channels, device=DEVICE)


def deviations(problem, plan=None, **options):
    """Of the convolution by a plan, and its gradients by x, sh and radial, from the reference in float64."""
    values = {}
    for backend, dtype in (("triton", problem.x.dtype), ("reference", torch.float64)):
        floats = tuple(t.detach().to(dtype).requires_grad_() for t in problem.floats)
        used = plan if plan and backend == "triton" else problem.plan
        out = convolve(*floats, problem.senders, problem.receivers, used, backend=backend, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view(out.shape).cos()
        values[backend] = (out, *torch.autograd.grad(out, floats, weight.to(dtype)))
    return [relative_error(a, b) for a, b in zip(values["triton"], values["reference"], strict=True)]


# --- equality with the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_channels", [1, 5, 32, 48])
@pytest.mark.parametrize(("l_max", "parity"), [(0, False), (1, False), (0, True)])
def test_equals_reference(l_max, parity, n_channels, dtype):
    problem = tiny_problem(make_layer_plan(l_max, parity), dtype, n_channels)
    assert np.max(deviations(problem)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("l_max", "parity", "n_channels", "dtype"),
    [
        (1, True, 48, torch.float32),
        (2, False, 1, torch.float64),
        (2, False, 32, torch.float32),
        (2, True, 5, torch.float64),
        (3, False, 5, torch.float32),
        (3, False, 32, torch.float64),
    ],
)
def test_long_kernels_equal_reference(l_max, parity, n_channels, dtype):
    assert np.max(deviations(tiny_problem(make_layer_plan(l_max, parity), dtype, n_channels))) < TOLERANCE[dtype]


@pytest.mark.parametrize("n_channels", [3, 33])
def test_wrong_sign_of_one_coefficient_is_noticed(n_channels):
    plan = make_layer_plan(1)
    cg = plan.paths[-1].cg.copy()
    cg[tuple(axis[0] for axis in cg.nonzero())] *= -1
    corrupted = dataclasses.replace(plan, paths=(*plan.paths[:-1], dataclasses.replace(plan.paths[-1], cg=cg)))
    assert min(deviations(tiny_problem(plan, n_channels=n_channels), corrupted)) > 1e-2


@pytest.mark.parametrize("n_atoms", [1, 2])
def test_one_atom_and_its_images(n_atoms):
    """The last of two atoms has no edges, the other one all of them."""
    assert np.max(deviations(tiny_problem(n_atoms=n_atoms))) < TOLERANCE[torch.float64]


def test_atom_without_edges_receives_nothing():
    problem = tiny_problem()
    out = convolve(*problem.floats, *problem.rest, backend="triton")
    assert not out[-1].any()
    assert out[:-1].any()


def test_more_receivers_than_senders():
    assert np.max(deviations(tiny_problem(), num_nodes=6)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("plan", "n_atoms", "n_edges", "n_channels"),
    [
        (SMALL, 0, 0, 2),
        (SMALL, 3, 0, 2),
        (SMALL, 3, 5, 0),
        (make_plan([(0, 1)], 0, [(1, -1)]), 3, 5, 2),
    ],
    ids=["nothing", "no edges", "no channels", "no paths"],
)
def test_empty_sums_are_zero(plan, n_atoms, n_edges, n_channels):
    problem = tiny_problem(plan, n_atoms=n_atoms, n_edges=n_edges, n_channels=n_channels, requires_grad=True)
    out = convolve(*problem.floats, *problem.rest, backend="triton")
    assert out.shape == (n_atoms, plan.dim_out, n_channels)
    assert not out.any()
    for grad, value in zip(torch.autograd.grad(out.sum(), problem.floats), problem.floats, strict=True):
        assert grad.shape == value.shape
        assert not grad.any()


@pytest.mark.parametrize("n_channels", [2, 33])
def test_features_and_harmonics_that_no_path_reads_have_no_gradient(n_channels):
    problem = tiny_problem(make_plan([(2, 1), (0, 1)], 1, [(0, 1)]), n_channels=n_channels, requires_grad=True)
    out = convolve(*problem.floats, *problem.rest, backend="triton")
    x, sh, _ = torch.autograd.grad(out.sum(), problem.floats)
    assert not x[:, :5].any()
    assert x[:, 5].any()
    assert not sh[:, 1:].any()
    assert sh[:, 0].any()


def test_non_contiguous_arguments():
    problem = tiny_problem(requires_grad=True)
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in problem.floats]
    assert not any(t.is_contiguous() for t in strided)
    out = convolve(*strided, *problem.rest, backend="triton")
    expected = convolve(*problem.floats, *problem.rest, backend="triton")
    assert torch.equal(out, expected)
    weight = torch.randn(out.shape[::-1], dtype=out.dtype, device=DEVICE).permute(2, 1, 0)
    for a, b in zip(
        torch.autograd.grad(out, strided, weight), torch.autograd.grad(expected, problem.floats, weight), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n_channels", [2, 33])
def test_nan_stays_with_its_edge_and_channel(n_channels):
    """Though other edges and channels are computed beside it."""
    problem = tiny_problem(n_channels=n_channels)
    problem.radial[0, 0, 0] = float("nan")
    out = convolve(*problem.floats, *problem.rest, backend="triton").isnan()
    assert out[problem.receivers[0], 0, 0]
    assert out.sum() == 1


# --- derivatives -----------------------------------------------------------------------------------------------------


def test_first_and_second_derivatives():
    problem = tiny_problem(n_atoms=2, n_edges=2, requires_grad=True)

    def function(*floats):
        return convolve(*floats, *problem.rest, backend="triton")

    assert gradcheck(function, problem.floats)
    assert gradgradcheck(function, problem.floats)


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(range(3), n)])
@pytest.mark.parametrize("n_channels", [2, 33])
def test_derivatives_by_some_arguments(wanted, n_channels):
    """Each of the kernels alone: first derivatives, and the gradient of their square."""
    problem = tiny_problem(n_channels=n_channels)
    values = {}
    for backend in ("triton", "reference"):
        floats = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(problem.floats)]
        inputs = [floats[k] for k in wanted]
        out = convolve(*floats, *problem.rest, backend=backend)
        first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)
        values[backend] = (*first, *second)
    for a, b in zip(values["triton"], values["reference"], strict=True):
        assert relative_error(a, b) < 1e-11


def test_third_derivatives_equal_reference():
    products = [hessian_vector_product(backend, 4, 6, DEVICE) for backend in ("triton", "reference")]
    assert relative_error(*products) < 1e-11


# --- how the work is divided -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("l_max", "parity"), [*LAYERS, (3, True)])
@pytest.mark.parametrize("kind", ["forward", "grad_x", "grad_yw"])
def test_shares_hold_every_path_and_row_once(l_max, parity, kind):
    plan = make_layer_plan(l_max, parity)
    shares = make_shares(plan, kind)
    assert sorted(path.weight_index for share in shares for path in share.paths) == list(range(plan.n_paths))
    rows = sorted(row for share in shares for row in share.rows)
    assert rows == list(range(plan.dim_in if kind == "grad_x" else plan.dim_out))
    read = [sum(2 * path.l3 + 1 for path in share.paths) for share in shares]
    irreps = [{path.in_offset for path in share.paths} for share in shares]
    assert all(n <= ROWS_PER_SHARE or (kind == "grad_x" and len(i) == 1) for n, i in zip(read, irreps, strict=True))


@pytest.mark.parametrize(
    ("n_channels", "dtype", "tile"),
    [
        (1, "float32", (1, 32)),
        (5, "float32", (8, 4)),
        (16, "float64", (16, 2)),
        (32, "float32", (32, 1)),
        (48, "float32", (64, 1)),
        (96, "float32", (32, 1)),
        (128, "float32", (64, 1)),
        (128, "float64", (32, 1)),
    ],
)
def test_tile_fills_a_warp(n_channels, dtype, tile):
    assert make_tile(n_channels, dtype) == tile


COMPILE = """
import itertools
import re
import struct
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from equimd.kernels import make_layer_plan
from equimd.kernels.codegen import KINDS
from equimd.kernels.cache import import_source
from equimd.kernels.triton_codegen import OPTIONS, kernel_source

plan = make_layer_plan(1)
wanted = {abs(float(v)) for path in plan.paths for v in path.cg[path.cg != 0] if abs(abs(v) - 1) > 1e-14}
for kind, (n_channels, dtype, n_bits) in itertools.product(KINDS, [(5, "float64", 64), (33, "float32", 32)]):
    kernel = import_source(kernel_source(kind, plan, n_channels, dtype), f"{kind}_{dtype}").kernel
    signature = {name: f"*fp{n_bits}" for name in ("x", "y", "w", "g", "out", "out2")}
    signature |= {name: "*i64" for name in ("order", "other", "ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    assert compiled.asm["cubin"]
    text = compiled.asm["ptx"]
    assert not re.search(rf"\\.f{96 - n_bits}\\b", text), "arithmetic in the other precision"
    assert n_channels < 32 or "bar.sync" not in text, "a warp waits for itself"
    if dtype == "float64":
        found = {struct.unpack(">d", bytes.fromhex(digits))[0] for digits in re.findall("0d([0-9A-F]{16})", text)}
        assert found >= wanted, "coefficients are rounded"
"""


def test_kernels_compile_for_a_gpu_without_one(tmp_path):
    """To machine code, all in their own precision, with the coefficients to the last digit."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning", "-c", COMPILE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert result.returncode == 0, result.stderr


# --- which backend computes ------------------------------------------------------------------------------------------


def test_triton_is_not_for_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = make_problem()
    with pytest.raises(ValueError, match="triton backend takes float32 and float64 on a GPU, got torch.float64 on cpu"):
        convolve(*problem.floats, *problem.rest, backend="triton")


def test_triton_takes_two_precisions():
    problem = tiny_problem(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="triton backend takes"):
        convolve(*problem.floats, *problem.rest, backend="triton")


@pytest.mark.parametrize(
    ("dtype", "installed", "runs", "chosen"),
    [
        (torch.float32, True, True, "triton"),
        (torch.float64, True, True, "triton"),
        (torch.float16, True, True, "reference"),
        (torch.float32, False, True, "reference"),
        (torch.float32, True, False, "reference"),
    ],
)
def test_automatic_choice_on_a_gpu(monkeypatch, dtype, installed, runs, chosen):
    monkeypatch.setattr(kernels, "_has", lambda package: installed and package == "triton")
    monkeypatch.setattr(kernels, "_runs", lambda device: runs)
    tensor = SimpleNamespace(dtype=dtype, device=torch.device("cuda:0"))
    assert kernels._choose("auto", tensor) == chosen  # pyright: ignore
    with kernels.using("reference"):
        assert kernels._choose("auto", tensor) == "reference"  # pyright: ignore
    assert not kernels.fuses(dtype, tensor.device)


def test_compiler_that_fails_is_named_once(monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    device = torch.device(DEVICE)
    assert triton_gpu.runs.__wrapped__(device)
    monkeypatch.setattr(triton_gpu, "_kernel", fail)
    with pytest.warns(RuntimeWarning, match="triton does not work on .* Failed to find C compiler"):
        assert not triton_gpu.runs.__wrapped__(device)


def test_kernel_that_is_wrong_does_not_run(monkeypatch):
    right = triton_gpu.convolve_triton
    monkeypatch.setattr(triton_gpu, "convolve_triton", lambda *args: -right(*args))
    with pytest.warns(RuntimeWarning, match="1 · 1 · 1 is -1"):
        assert not triton_gpu.runs.__wrapped__(torch.device(DEVICE))


def test_self_check_falls_back(monkeypatch):
    settings = EquivariantSettings(n_channels=2, l_max=1, n_layers=2, avg_num_neighbors=20.0)
    potential = EquivariantPotential(settings, (1, 8), toys.ISOLATED).to(DEVICE)
    right = triton_gpu.convolve_triton

    def wrong(*args):
        out = right(*args)
        return torch.cat([out[:, :-1], -out[:, -1:]], dim=1)

    with kernels.using("triton"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing to say of sound kernels
            assert self_check(potential).ok
        assert potential.kernel_backend == "auto"
        monkeypatch.setattr(triton_gpu, "convolve_triton", wrong)
        slower = "llvm" if DEVICE == "cpu" else "reference"
        with pytest.warns(RuntimeWarning, match=f'"auto": off by .* "{slower}" is used instead'):
            assert self_check(potential).ok
    assert potential.kernel_backend == slower
