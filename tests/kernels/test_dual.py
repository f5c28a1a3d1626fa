"""Dual numbers against autograd: the rate of change is the derivative along the given direction."""

import pytest
import torch

from equimd.kernels import convolve, dual, dual_codegen, make_layer_plan, make_topology
from equimd.kernels.dual import Shares, convolve_dual

N, E, C = 5, 23, 7


def problem(plan, dtype=torch.float64, n_edges=E):
    """x, sh, the table, its shares, the plan and the topology."""
    generator = torch.Generator().manual_seed(1)
    senders, receivers = torch.randint(N, (2, n_edges), generator=generator)
    shapes = [(N, 2, plan.dim_in, C), (n_edges, 2, plan.dim_sh), (3 * 9, plan.n_paths, C), (n_edges, 2, 6)]
    x, sh, table, shares = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    interval = torch.randint(8, (n_edges,), generator=generator)
    arrays = x.requires_grad_(), sh, table.requires_grad_(), Shares(shares, interval, step=3)
    return *arrays, plan, make_topology(senders, receivers, N)


def interpolated(table, shares):
    """Radial weights and their rates, (E, 2, P, C)."""
    rows = shares.interval[:, None] * shares.step + torch.arange(shares.n_taken)
    return torch.einsum("edq,eqpc->edpc", shares.values, table[rows])


def as_reference(out, plan):
    """Rows of ``convolve_dual`` in the order of ``convolve``."""
    return out[:, :, [dual_codegen.row_of(plan, path, k) for path in plan.paths for k in range(2 * path.l3 + 1)]]


def by_autograd(x, sh, table, shares, plan, topology):
    """Value and rate of change of the reference, from two derivatives."""

    def value(*arrays):
        edges = (topology.senders, topology.receivers)
        return convolve(*arrays, *edges, plan, num_nodes=N, backend="reference")

    values, rates = zip(*(tensor.unbind(1) for tensor in (x, sh, interpolated(table, shares))), strict=True)
    return torch.stack(torch.autograd.functional.jvp(value, values, rates, create_graph=True), dim=1)


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


SINGLE, DOUBLE = (torch.float32, 3e-6), (torch.float64, 1e-13)  # rounding of sums of some hundred products


def both(arguments):
    """Ours and the reference."""
    return as_reference(convolve_dual(*arguments), arguments[4]), by_autograd(*arguments)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 18], ids=lambda chunk: f"chunk {chunk}")
@pytest.mark.parametrize(
    ("l_max", "parity", "precision"),
    [(0, False, SINGLE), (1, True, SINGLE), (1, True, DOUBLE), (2, False, DOUBLE), (3, False, DOUBLE)],
)
def test_value_rate_and_gradients(l_max, parity, precision, chunk, monkeypatch):
    """Whether one edge at a time, some, or all."""
    monkeypatch.setattr(dual, "_CHUNK", chunk)
    dtype, bound = precision
    arguments = problem(make_layer_plan(l_max, parity), dtype)
    own, reference = both(arguments)
    assert relative(own, reference) < bound
    weights = torch.randn(own.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((y * weights).sum(), [arguments[0], arguments[2]]) for y in (own, reference)]
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 2 * bound


def test_a_wrong_product_is_noticed(monkeypatch):
    """The negative twin: without the rate of the harmonics, the rate of change is wrong and the value right."""
    right = dual_codegen._products
    monkeypatch.setattr(
        dual_codegen, "_products", lambda path: {k: (u, v.split(" + b")[0]) for k, (u, v) in right(path).items()}
    )
    dual._kernel.cache_clear()
    own, reference = both(problem(make_layer_plan(1)))
    dual._kernel.cache_clear()
    assert relative(own[:, 0], reference[:, 0]) < 1e-13
    assert relative(own[:, 1], reference[:, 1]) > 1e-2


def test_a_table_read_at_the_wrong_rows_is_noticed():
    """The negative twin of the table."""
    x, sh, table, shares, *rest = problem(make_layer_plan(1))
    wrong = Shares(shares.values, 7 - shares.interval, shares.step)
    own = as_reference(convolve_dual(x, sh, table, wrong, *rest), rest[0])
    assert relative(own, by_autograd(x, sh, table, shares, *rest)) > 1e-2


@pytest.mark.parametrize("chunk", [1, 200, 1 << 18], ids=lambda chunk: f"chunk {chunk}")
def test_atoms_without_edges(chunk, monkeypatch):
    """At the beginning, between others and at the end, whatever the chunks: they receive and send nothing."""
    monkeypatch.setattr(dual, "_CHUNK", chunk)
    x, sh, table, shares, plan, _ = problem(make_layer_plan(1))
    generator = torch.Generator().manual_seed(3)
    senders, receivers = (torch.tensor([1, 3])[torch.randint(2, (E,), generator=generator)] for _ in range(2))
    arguments = x, sh, table, shares, plan, make_topology(senders, receivers, N)
    own, reference = both(arguments)
    assert relative(own, reference) < 1e-13
    assert not own[[0, 2, 4]].any()
    gradients = [torch.autograd.grad(y.square().sum(), [x, table]) for y in (own, reference)]
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-12
    assert not gradients[0][0][[0, 2, 4]].any()


def test_no_edges():
    plan = make_layer_plan(2)
    arguments = problem(plan, n_edges=0)
    out = convolve_dual(*arguments)
    assert torch.equal(out, torch.zeros_like(out))
    for gradient in torch.autograd.grad(out.sum(), [arguments[0], arguments[2]]):
        assert not gradient.any()


def test_is_differentiable_once():
    arguments = problem(make_layer_plan(1))
    (gradient,) = torch.autograd.grad(convolve_dual(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_threads_do_not_matter(set_threads, monkeypatch):
    arguments = problem(make_layer_plan(2))

    def everything():
        out = convolve_dual(*arguments)
        return out.detach(), *torch.autograd.grad(out.square().sum(), [arguments[0], arguments[2]])

    alone = everything()
    monkeypatch.setattr(dual, "WORK_PER_THREAD", 1)
    monkeypatch.setattr(dual, "_CHUNK", 1000)
    set_threads(3)
    for shared, expected in zip(everything(), alone, strict=True):
        assert relative(shared, expected) < 1e-13


def test_what_does_not_fit_is_refused():
    x, sh, table, shares, *rest = problem(make_layer_plan(1))
    with pytest.raises(ValueError, match="x must be"):
        convolve_dual(x[:-1], sh, table, shares, *rest)
    with pytest.raises(ValueError, match="sh must be"):
        convolve_dual(x, sh[..., :-1], table, shares, *rest)
    with pytest.raises(ValueError, match="table must be"):
        convolve_dual(x, sh, table[:, :-1], shares, *rest)
    with pytest.raises(ValueError, match="shares must be"):
        convolve_dual(x, sh, table, Shares(shares.values[:-1], shares.interval, 3), *rest)
    with pytest.raises(ValueError, match="float32 or float64"):
        convolve_dual(x.half(), sh.half(), table.half(), Shares(shares.values.half(), shares.interval, 3), *rest)
    for interval in (shares.interval[:-1], shares.interval.to(torch.int32)):
        with pytest.raises(ValueError, match=r"interval must be \(\d+,\) torch.int64 on the CPU"):
            convolve_dual(x, sh, table, Shares(shares.values, interval, 3), *rest)
    with pytest.raises(ValueError, match=r"interval must lie in 0\.\.7, got .*\.\.8"):
        convolve_dual(x, sh, table, Shares(shares.values, shares.interval.clone().fill_(8), 3), *rest)
