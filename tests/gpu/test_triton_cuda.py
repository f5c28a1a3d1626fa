"""What only a GPU can show of the kernels: compiled, at larger sizes, on streams, and in whole potentials."""

import dataclasses
import warnings

import pytest
import torch
import toys
from kernel_problems import hessian_vector_product, make_problem, relative_error
from torch.autograd import gradcheck, gradgradcheck

from equimd import kernels
from equimd.kernels import convolve, make_layer_plan, make_topology, triton_gpu
from equimd.models import selfcheck
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.selfcheck import self_check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # of sums of a few hundred products, relative to their norm
LAYERS = [(0, False), (1, False), (2, False), (3, False), (0, True), (1, True), (2, True)]
CHANNELS = {torch.float32: (1, 5, 48, 64, 200), torch.float64: (5, 32, 48, 200)}
CASES = [(*layer, n, dtype) for dtype, sizes in CHANNELS.items() for n in sizes for layer in LAYERS]
CASES += [(3, True, 64, torch.float32), (3, True, 5, torch.float64)]  # long to compile


def cuda_problem(plan, dtype, n_channels, n_atoms=50, n_edges=700, **options):
    return make_problem(plan, dtype, n_atoms, n_edges, n_channels, device="cuda", **options)


def values(problem, backend, dtype=None):
    """The convolution and its gradients by x, sh and radial."""
    floats = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in problem.floats)
    out = convolve(*floats, *problem.rest, backend=backend)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device="cuda").view(out.shape).cos()
    return (out, *torch.autograd.grad(out, floats, weight.to(out.dtype)))


@pytest.mark.parametrize(("l_max", "parity", "n_channels", "dtype"), CASES)
def test_equals_reference(l_max, parity, n_channels, dtype):
    problem = cuda_problem(make_layer_plan(l_max, parity), dtype, n_channels)
    exact = values(problem, "reference", torch.float64)
    for a, b in zip(values(problem, "triton"), exact, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]


def test_wrong_sign_of_one_coefficient_is_noticed():
    plan = make_layer_plan(2)
    problem = cuda_problem(plan, torch.float32, 32)
    cg = plan.paths[-1].cg.copy()
    cg[tuple(axis[0] for axis in cg.nonzero())] *= -1
    corrupted = dataclasses.replace(plan, paths=(*plan.paths[:-1], dataclasses.replace(plan.paths[-1], cg=cg)))
    exact = values(problem, "reference", torch.float64)
    for a, b in zip(values(dataclasses.replace(problem, plan=corrupted), "triton"), exact, strict=True):
        assert relative_error(a, b) > 1e-3


@pytest.mark.parametrize("n_channels", [2, 33])
def test_first_and_second_derivatives(n_channels):
    plan = make_layer_plan(1)
    problem = cuda_problem(plan, torch.float64, n_channels, n_atoms=3, n_edges=4, requires_grad=True)

    def function(*floats):
        return convolve(*floats, *problem.rest, backend="triton")

    assert gradcheck(function, problem.floats, fast_mode=n_channels > 2)
    assert gradgradcheck(function, problem.floats, fast_mode=n_channels > 2)


def test_third_derivatives_equal_reference():
    products = [hessian_vector_product(backend, device="cuda") for backend in ("triton", "reference")]
    assert relative_error(*products) < 1e-11


@pytest.mark.parametrize("n_channels", [5, 64])
def test_every_run_is_the_same_to_the_last_bit(n_channels):
    problem = cuda_problem(make_layer_plan(2), torch.float32, n_channels, n_atoms=500, n_edges=20_000)
    first = values(problem, "triton")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(values(problem, "triton"), first, strict=True))


@pytest.mark.parametrize("n_channels", [2, 33])
def test_nan_stays_with_its_edge_and_channel(n_channels):
    problem = cuda_problem(make_layer_plan(1), torch.float32, n_channels)
    problem.radial[0, 0, 0] = float("nan")
    out = convolve(*problem.floats, *problem.rest, backend="triton").isnan()
    assert out[problem.receivers[0], 0, 0]
    assert out.sum() == 1


def test_memory_that_begins_anywhere():
    """Vectors of numbers are loaded at once only where their addresses allow it."""
    problem = cuda_problem(make_layer_plan(1), torch.float32, 64)
    shifted = []
    for t in problem.floats:
        memory = t.new_empty(t.numel() + 1)
        shifted.append(memory[1:].view(t.shape).copy_(t))
    moved = dataclasses.replace(problem, x=shifted[0], sh=shifted[1], radial=shifted[2])
    for a, b in zip(values(moved, "triton"), values(problem, "triton"), strict=True):
        assert relative_error(a, b) < TOLERANCE[torch.float32]


def test_on_another_stream():
    problem = cuda_problem(make_layer_plan(2), torch.float32, 32)
    expected = values(problem, "triton")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = values(problem, "triton")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    problem = cuda_problem(make_layer_plan(1), torch.float32, 32)
    floats = [t.to("cuda:1") for t in problem.floats]
    out = convolve(*floats, problem.senders.to("cuda:1"), problem.receivers.to("cuda:1"), problem.plan)
    assert torch.equal(out.cpu(), convolve(*problem.floats, *problem.rest).cpu())


def test_arrays_of_more_numbers_than_32_bits_count():
    """The weights and their gradient are 9 GB each."""
    n_edges, n_channels, plan = 2_200_000, 256, make_layer_plan(1)
    assert n_edges * plan.n_paths * n_channels > 2**31
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of memory")
    x = torch.randn(1000, plan.dim_in, n_channels, device="cuda")
    sh = torch.randn(n_edges, plan.dim_sh, device="cuda")
    radial = torch.randn(n_edges, plan.n_paths, n_channels, device="cuda").requires_grad_()
    senders = torch.randint(0, 1000, (n_edges,), device="cuda")
    receivers = torch.arange(n_edges, device="cuda") * 100_000 // n_edges
    out = convolve(x, sh, radial, senders, receivers, plan, num_nodes=100_000, backend="triton")
    (grad,) = torch.autograd.grad(out[-1].square().sum(), radial)
    last = (receivers == 99_999).nonzero().flatten()
    rows = radial.detach()[last].requires_grad_()
    exact = convolve(x, sh[last], rows, senders[last], receivers[last] - 99_999, plan, num_nodes=1, backend="reference")
    (wanted,) = torch.autograd.grad(exact.square().sum(), rows)
    assert relative_error(out[-1:], exact) < TOLERANCE[torch.float32]
    assert relative_error(grad[last], wanted) < TOLERANCE[torch.float32]
    assert not grad[: last[0]].any()


# --- whole potentials ------------------------------------------------------------------------------------------------


def potential(**options):
    settings = EquivariantSettings(**{"n_channels": 8, "n_layers": 2, "avg_num_neighbors": 20.0, **options})
    torch.manual_seed(0)
    return EquivariantPotential(settings, (1, 8), toys.ISOLATED).to("cuda")


def test_it_is_what_a_gpu_uses():
    problem = cuda_problem(make_layer_plan(1), torch.float32, 4)
    assert kernels._choose("auto", problem.x) == "triton"
    topology = make_topology(problem.senders, problem.receivers, len(problem.x))
    automatic = convolve(*problem.floats, *problem.rest, topology=topology)
    assert torch.equal(automatic, convolve(*problem.floats, *problem.rest, backend="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"l_max": 2}, {"l_max": 3}, {"l_max": 1, "parity": True}, {"l_max": 0}])
def test_sound_potential_passes_its_check(options, dtype):
    checked = potential(**options).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = self_check(checked)
    assert report.ok, report.messages
    assert checked.kernel_backend == "auto"


def test_broken_kernels_fall_back_to_the_reference(monkeypatch):
    right = triton_gpu.convolve_triton

    def wrong(*args):
        out = right(*args)
        return torch.cat([out[:, :-1], -out[:, -1:]], dim=1)

    checked = potential()
    monkeypatch.setattr(triton_gpu, "convolve_triton", wrong)
    with pytest.warns(RuntimeWarning, match='"auto": off by .* "reference" is used instead'):
        assert self_check(checked).ok
    assert checked.kernel_backend == "reference"


def test_training_step_equals_the_reference():
    """The gradient of a force loss by all weights."""
    structure = selfcheck._small_structure((1, 8), 5.0)
    gradients = {}
    for backend in ("triton", "reference"):
        trained = potential().to(torch.float64)
        graph = structure.graph(trained.cutoff).to(trained.device)
        with kernels.using(backend):
            trained(graph, create_graph=True).forces.square().sum().backward()
        gradients[backend] = torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])
    assert gradients["reference"].any()
    assert relative_error(gradients["triton"], gradients["reference"]) < 1e-9
