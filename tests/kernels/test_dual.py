"""Dual numbers against autograd: the rate of change is the derivative along the given direction."""

import pytest
import torch

from equimd.kernels import convolve, dual, dual_codegen, make_layer_plan, make_topology
from equimd.kernels.dual import convolve_dual

N, E, C = 5, 23, 7


def problem(plan, dtype=torch.float64, n_edges=E):
    generator = torch.Generator().manual_seed(1)
    senders, receivers = torch.randint(N, (2, n_edges), generator=generator)
    shapes = [(N, 2, plan.dim_in, C), (n_edges, 2, plan.dim_sh), (n_edges, 2, plan.n_paths, C)]
    return *(torch.randn(s, generator=generator, dtype=dtype) for s in shapes), make_topology(senders, receivers, N)


def as_reference(out, plan):
    """Rows of ``convolve_dual`` in the order of ``convolve``."""
    return out[:, :, [dual_codegen.row_of(plan, path, k) for path in plan.paths for k in range(2 * path.l3 + 1)]]


def by_autograd(x, sh, w, plan, topology):
    """Value and rate of change of the reference, from two derivatives."""

    def value(*arrays):
        edges = (topology.senders, topology.receivers)
        return convolve(*arrays, *edges, plan, num_nodes=N, backend="reference")

    values, rates = zip(*(tensor.unbind(1) for tensor in (x, sh, w)), strict=True)
    return torch.stack(torch.autograd.functional.jvp(value, values, rates, create_graph=True), dim=1)


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


SINGLE, DOUBLE = (torch.float32, 3e-6), (torch.float64, 1e-13)  # rounding of sums of some hundred products


@pytest.mark.parametrize(
    ("l_max", "parity", "precision"),
    [(0, False, SINGLE), (1, True, SINGLE), (1, True, DOUBLE), (2, False, DOUBLE), (3, False, DOUBLE)],
)
def test_value_rate_and_gradients(l_max, parity, precision):
    dtype, bound = precision
    plan = make_layer_plan(l_max, parity)
    x, sh, w, topology = problem(plan, dtype)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    own = as_reference(convolve_dual(x, sh, w, plan, topology), plan)
    reference = by_autograd(x, sh, w, plan, topology)
    assert relative(own, reference) < bound
    weights = torch.randn(own.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    for a, b in zip(
        torch.autograd.grad((own * weights).sum(), leaves),
        torch.autograd.grad((reference * weights).sum(), leaves),
        strict=True,
    ):
        assert relative(a, b) < bound


def test_a_wrong_product_is_noticed(monkeypatch):
    """The negative twin: without the rate of the harmonics, the rate of change is wrong and the value right."""
    right = dual_codegen._products
    monkeypatch.setattr(
        dual_codegen, "_products", lambda path: {k: (u, v.split(" + b")[0]) for k, (u, v) in right(path).items()}
    )
    dual._kernel.cache_clear()
    plan = make_layer_plan(1)
    x, sh, w, topology = problem(plan)
    own = as_reference(convolve_dual(x, sh, w, plan, topology), plan)
    reference = by_autograd(x, sh, w, plan, topology)
    dual._kernel.cache_clear()
    assert relative(own[:, 0], reference[:, 0]) < 1e-13
    assert relative(own[:, 1], reference[:, 1]) > 1e-2


def test_no_edges():
    plan = make_layer_plan(2)
    x, sh, w, topology = problem(plan, n_edges=0)
    out = convolve_dual(x.requires_grad_(), sh, w, plan, topology)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros_like(x))


def test_is_differentiable_once():
    plan = make_layer_plan(1)
    x, sh, w, topology = problem(plan)
    out = convolve_dual(x.requires_grad_(), sh, w, plan, topology)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_threads_do_not_matter(set_threads, monkeypatch):
    plan = make_layer_plan(2)
    x, sh, w, topology = problem(plan)
    leaves = [x.requires_grad_(), w.requires_grad_()]

    def everything():
        out = convolve_dual(x, sh, w, plan, topology)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    alone = everything()
    monkeypatch.setattr(dual, "WORK_PER_THREAD", 1)
    set_threads(3)
    for shared, expected in zip(everything(), alone, strict=True):
        assert relative(shared, expected) < 1e-13


@pytest.mark.parametrize("name", ["x", "sh", "radial"])
def test_wrong_shapes_are_refused(name):
    plan = make_layer_plan(1)
    x, sh, w, topology = problem(plan)
    arrays = {"x": x, "sh": sh, "radial": w}
    arrays[name] = arrays[name][..., :-1] if name != "x" else x[:-1]
    with pytest.raises(ValueError, match=f"{name} must be"):
        convolve_dual(*arrays.values(), plan, topology)
