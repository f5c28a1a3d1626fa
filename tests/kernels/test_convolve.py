import dataclasses

import pytest
import torch
from e3nn import o3
from kernel_problems import hessian_vector_product, make_problem, relative_error
from torch.autograd import gradcheck, gradgradcheck

from equimd import kernels
from equimd.kernels import convolve, make_layer_plan, make_plan, make_topology, standard_irreps

BACKENDS = ("reference", "llvm")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # of sums of a few hundred products, relative to their norm
LAYERS = [(0, False), (1, False), (2, False), (3, False), (0, True), (1, True), (2, True)]


def e3nn_convolve(problem):
    """The same sum by e3nn's TensorProduct, one 'uvu' instruction per path, in this package's layout."""
    plan, n_channels = problem.plan, problem.x.shape[2]
    irreps_in = o3.Irreps([(n_channels, irrep) for irrep in plan.irreps_in])
    irreps_sh = o3.Irreps.spherical_harmonics(plan.l_max_sh)
    irreps_out = o3.Irreps([(n_channels, (p.l3, p.p3)) for p in plan.paths])
    instructions = [(plan.irreps_in.index((p.l1, p.p1)), p.l2, k, "uvu", True, 1.0) for k, p in enumerate(plan.paths)]
    product = o3.TensorProduct(
        irreps_in,
        irreps_sh,
        irreps_out,
        instructions,
        irrep_normalization="component",
        path_normalization="none",
        internal_weights=False,
        shared_weights=False,
    ).to(problem.x.dtype)
    blocks = [problem.x[:, s.start // n_channels : s.stop // n_channels] for s in irreps_in.slices()]
    x = torch.cat([block.transpose(1, 2).flatten(1) for block in blocks], dim=1)
    message = product(x[problem.senders], problem.sh, problem.radial.flatten(1))
    summed = torch.zeros(len(x), message.shape[1], dtype=x.dtype).index_add(0, problem.receivers, message)
    blocks = [summed[:, s].unflatten(1, (n_channels, -1)).transpose(1, 2) for s in irreps_out.slices()]
    return torch.cat(blocks, dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # e3nn compiles its products with TorchScript
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("l_max", "parity"), LAYERS)
def test_equals_e3nn(l_max, parity, dtype):
    problem = make_problem(make_layer_plan(l_max, parity), dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # e3nn stores its coefficients in the default dtype
    try:
        expected = e3nn_convolve(problem)
    finally:
        torch.set_default_dtype(before)
    for backend in BACKENDS:
        out = convolve(*problem.floats, *problem.rest, backend=backend)
        assert out.dtype == dtype
        assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives(backend):
    problem = make_problem(make_layer_plan(1), n_atoms=3, n_edges=4, n_channels=2, requires_grad=True)

    def function(*floats):
        return convolve(*floats, *problem.rest, backend=backend)

    assert gradcheck(function, problem.floats)
    assert gradgradcheck(function, problem.floats)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_derivatives_of_some_arguments(wanted):
    problem = make_problem(make_layer_plan(1), n_atoms=3, n_edges=4, n_channels=2)
    inputs = tuple(t.clone().requires_grad_(k in wanted) for k, t in enumerate(problem.floats))

    def function(*floats):
        return convolve(*floats, *problem.rest, backend="llvm")

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(("l_max", "parity", "dtype"), [(2, False, torch.float32), (3, False, torch.float64)])
def test_gradients_equal_reference(l_max, parity, dtype):
    problem = make_problem(make_layer_plan(l_max, parity), dtype, requires_grad=True)
    grads = {}
    for backend in BACKENDS:
        out = convolve(*problem.floats, *problem.rest, backend=backend)
        grads[backend] = torch.autograd.grad(out.sin().sum(), problem.floats)
    for a, b in zip(grads["llvm"], grads["reference"], strict=True):
        assert relative_error(a, b) < 5 * TOLERANCE[dtype]


def test_third_derivatives_equal_reference():
    assert relative_error(hessian_vector_product("llvm"), hessian_vector_product("reference")) < 1e-11


def test_sorted_and_unsorted_edges_agree():
    problem = make_problem(requires_grad=True)
    order = torch.argsort(problem.receivers, stable=True)
    x, sh, radial = problem.floats
    out = convolve(x, sh, radial, *problem.rest, backend="llvm")
    topology = make_topology(problem.senders[order], problem.receivers[order], len(x))
    out_sorted = convolve(
        x, sh[order], radial[order], problem.senders[order], problem.receivers[order], problem.plan, topology=topology
    )
    assert torch.equal(out, out_sorted)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), problem.floats),
        torch.autograd.grad(out_sorted.square().sum(), problem.floats),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # the order of the senders' sums differs


@pytest.mark.parametrize("backend", BACKENDS)
def test_isolated_atom_receives_nothing(backend):
    problem = make_problem()
    out = convolve(*problem.floats, *problem.rest, backend=backend)
    assert not out[-1].any()
    assert out[:-1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_atoms", [0, 1, 3])
def test_no_edges(backend, n_atoms):
    problem = make_problem(n_atoms=n_atoms, n_edges=0, requires_grad=True)
    out = convolve(*problem.floats, *problem.rest, backend=backend)
    assert out.shape == (n_atoms, problem.plan.dim_out, 4)
    assert not out.any()
    for grad, value in zip(torch.autograd.grad(out.sum(), problem.floats), problem.floats, strict=True):
        assert grad.shape == value.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_atom_in_a_periodic_cell(backend):
    problem = make_problem(n_atoms=1)
    out = convolve(*problem.floats, *problem.rest, backend=backend)
    expected = convolve(*problem.floats, *problem.rest, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_more_receivers_than_senders():
    problem = make_problem()
    out = convolve(*problem.floats, *problem.rest, num_nodes=11, backend="llvm")
    assert out.shape[0] == 11
    assert torch.equal(out[:7], convolve(*problem.floats, *problem.rest, backend="llvm"))
    assert not out[7:].any()


def test_non_contiguous_arguments():
    problem = make_problem(requires_grad=True)
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in problem.floats]
    assert not any(t.is_contiguous() for t in strided)
    out = convolve(*strided, *problem.rest, backend="llvm")
    expected = convolve(*problem.floats, *problem.rest, backend="llvm")
    assert torch.equal(out, expected)
    weight = torch.randn(out.shape[::-1], dtype=out.dtype).permute(2, 1, 0)
    for a, b in zip(
        torch.autograd.grad(out, strided, weight), torch.autograd.grad(expected, problem.floats, weight), strict=True
    ):
        assert torch.equal(a, b)


def test_gradients_that_skip_unreached_harmonics_are_zero():
    problem = make_problem(make_plan([(0, 1)], 2, [(0, 1)]), requires_grad=True)
    out = convolve(*problem.floats, *problem.rest, backend="llvm")
    (grad,) = torch.autograd.grad(out.sum(), problem.sh)
    assert not grad[:, 1:].any()


def equivariance_error(plan, backend):
    """Relative change of out(Qx, QY) − Q·out(x, Y) for an improper Q, Y the harmonics of random vectors."""
    problem = make_problem(plan)
    generator = torch.Generator().manual_seed(8)
    vectors = torch.randn(len(problem.senders), 3, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    rotation = -rotation * torch.linalg.det(rotation).sign()
    rotation = rotation[[1, 2, 0]][:, [1, 2, 0]]  # any orthogonal matrix will do; e3nn's is in its own axis order

    def act(irreps):
        return torch.block_diag(*(o3.Irrep(l, p).D_from_matrix(rotation.float()).double() for l, p in irreps))  # noqa: E741

    def harmonics(v):
        return o3.spherical_harmonics(list(range(plan.l_max_sh + 1)), v, normalize=True, normalization="component")

    act_in, act_out = act(plan.irreps_in), act([(p.l3, p.p3) for p in plan.paths])
    out = convolve(problem.x, harmonics(vectors), problem.radial, *problem.rest, backend=backend)
    rotated = torch.einsum("ij,njc->nic", act_in, problem.x)
    out_rotated = convolve(rotated, harmonics(vectors @ rotation.T), problem.radial, *problem.rest, backend=backend)
    return relative_error(out_rotated, torch.einsum("ij,njc->nic", act_out, out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolution_is_equivariant_and_a_corrupted_one_is_not(backend):
    plan = make_layer_plan(1, parity=True)
    assert equivariance_error(plan, backend) < 1e-6  # e3nn's matrices are float32 here
    cg = plan.paths[-1].cg.copy()
    cg[tuple(cg.nonzero()[axis][0] for axis in range(3))] *= 1.1
    corrupted = dataclasses.replace(plan, paths=(*plan.paths[:-1], dataclasses.replace(plan.paths[-1], cg=cg)))
    assert equivariance_error(corrupted, backend) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 8, 4, dtype=torch.float64)}, "x must be"),
        ({"sh": torch.zeros(30, 4, dtype=torch.float64)}, "sh must be"),
        ({"radial": torch.zeros(30, 11, 3, dtype=torch.float64)}, "radial must be"),
        ({"sh": torch.zeros(30, 9)}, "share dtype"),
        ({"senders": torch.zeros(30, dtype=torch.int64, device="meta")}, "their device with the edges"),
        ({"senders": torch.full((30,), 7)}, "senders must lie in 0..6"),
        ({"receivers": torch.full((30,), -1)}, "receivers must lie in 0..6"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    problem = dataclasses.replace(make_problem(), **change)
    with pytest.raises(ValueError, match=message):
        convolve(*problem.floats, *problem.rest, backend="llvm")


def test_wrong_topology_and_backend_are_refused():
    problem = make_problem()
    with pytest.raises(ValueError, match="topology is of 8 senders"):
        convolve(*problem.floats, *problem.rest, topology=make_topology(problem.senders, problem.receivers, 8))
    with pytest.raises(ValueError, match="backend must be"):
        convolve(*problem.floats, *problem.rest, backend="cuda")  # pyright: ignore
    half = make_problem(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="llvm backend takes"):
        convolve(*half.floats, *half.rest, backend="llvm")
    assert convolve(*half.floats, *half.rest).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["llvm", "triton"])
def test_a_backend_that_is_asked_for_and_missing_is_named(monkeypatch, backend):
    """TRITON_INTERPRET, which other tests set, lets triton be asked for on a CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_has", lambda asked: asked != backend)
    problem = make_problem()
    with pytest.raises(ValueError, match=f"the {backend} backend needs the package"):
        convolve(*problem.floats, *problem.rest, backend=backend)


def test_standard_irreps_and_parity_order_agree_with_e3nn():
    assert [str(o3.Irrep(l, p)) for l, p in standard_irreps(1, parity=True)] == ["0e", "0o", "1o", "1e"]  # noqa: E741
