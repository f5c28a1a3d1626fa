"""Interpolation from a table: values, and the gradient of the table."""

import pytest
import torch

from equimd.kernels import interpolation
from equimd.kernels.interpolation import interpolate, make_intervals


def make_problem(n_edges=20, width=5, n_intervals=8, dtype=torch.float64, step=3, n_taken=6):
    generator = torch.Generator().manual_seed(1)
    interval = torch.randint(0, n_intervals, (n_edges,), generator=generator)
    intervals = make_intervals(interval, n_intervals, step, n_taken)
    weights = torch.randn(n_edges, n_taken, dtype=dtype, generator=generator)
    table = torch.randn(intervals.n_rows, width, dtype=dtype, generator=generator, requires_grad=True)
    return weights, table, intervals


def reference(weights, table, intervals):
    rows = intervals.interval[:, None] * intervals.step + torch.arange(intervals.n_taken)
    return torch.einsum("eq,eqm->em", weights, table[rows])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize(
    "sizes", [{}, {"n_edges": 0}, {"n_edges": 1, "width": 1}, {"step": 6}, {"step": 1, "n_taken": 4}]
)
def test_equals_reference(dtype, tolerance, sizes):
    problem = make_problem(dtype=dtype, **sizes)
    assert torch.allclose(interpolate(*problem), reference(*problem), rtol=0, atol=tolerance)
    (ours,) = torch.autograd.grad(interpolate(*problem).sin().sum(), problem[1])
    (theirs,) = torch.autograd.grad(reference(*problem).sin().sum(), problem[1])
    assert torch.allclose(ours, theirs, rtol=0, atol=10 * tolerance)


def test_gradient_of_the_table():
    weights, table, intervals = make_problem(n_edges=6, width=3, n_intervals=3)
    assert torch.autograd.gradcheck(lambda t: interpolate(weights, t, intervals), (table,))


def test_gradcheck_sees_a_wrong_derivative(monkeypatch):
    weights, table, intervals = make_problem(n_edges=6, width=3, n_intervals=3)
    right = interpolation._run

    def wrong(kind, *args):
        return right(kind, *args) * (1.01 if kind == "table" else 1.0)

    monkeypatch.setattr(interpolation, "_run", wrong)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda t: interpolate(weights, t, intervals), (table,))


def test_does_not_depend_on_threads(set_threads, monkeypatch):
    weights, table, intervals = make_problem(n_edges=200, dtype=torch.float32)

    def everything():
        out = interpolate(weights, table, intervals)
        return (out, *torch.autograd.grad(out.square().sum(), table))

    set_threads(1)
    expected = everything()
    monkeypatch.setattr(interpolation, "WORK_PER_THREAD", 1)
    set_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


def test_what_does_not_fit_is_refused():
    weights, table, intervals = make_problem()
    with pytest.raises(ValueError, match="must be"):
        interpolate(weights, table[:-1], intervals)
    with pytest.raises(ValueError, match="float32 or float64"):
        interpolate(weights.float(), table, intervals)
    with pytest.raises(ValueError, match=r"interval must lie in 0\.\.7"):
        make_intervals(torch.tensor([8]), 8, 3, 6)
