"""Linear maps and gates of dual numbers against the layers of the model: rates of change are derivatives of values."""

import pytest
import torch

from equimd.kernels import dual_gate_codegen, dual_mixing, standard_irreps
from equimd.kernels.dual_codegen import row_of
from equimd.kernels.dual_mixing import map_rows, mix_and_gate
from equimd.kernels.plan import irreps_dim
from equimd.models.equivariant import SCALAR, EquivariantSettings, InteractionLayer

N, C = 5, 6
SINGLE, DOUBLE = (torch.float32, 3e-6), (torch.float64, 1e-13)  # rounding of sums of some hundred products


def make_layer(l_max, parity, is_last, dtype):
    torch.manual_seed(1)
    settings = EquivariantSettings(cutoff=4.0, l_max=l_max, parity=parity, n_channels=C)
    irreps = standard_irreps(l_max, parity)
    return InteractionLayer(settings, irreps, (SCALAR,) if is_last else irreps).to(dtype)


def inputs(plan, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    message, x = (torch.randn(N, 2, rows, C, generator=generator, dtype=dtype) for rows in (plan.dim_out, plan.dim_in))
    return message.requires_grad_(), x.requires_grad_()


def by_autograd(layer, message, x):
    """Value and rate of the model's own layer; ``message`` is in the order of ``convolve_dual``."""
    rows = [row_of(layer.plan, path, k) for path in layer.plan.paths for k in range(2 * path.l3 + 1)]

    def value(message, x):
        parts = list(x.split([2 * l + 1 for l, _ in layer.irreps_in], dim=1))  # noqa: E741
        return layer._gate(layer.mix(layer.mix_inputs(message, parts)))

    values, rates = zip((message[:, :, rows]).unbind(1), x.unbind(1), strict=True)
    return torch.stack(torch.autograd.functional.jvp(value, values, rates, create_graph=True), dim=1)  # pyright: ignore


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def differences(layer, message, x):
    """Relative differences of the output, and of its gradients by the inputs and by every matrix."""
    weights = list(layer.mix.weights)
    own, reference = mix_and_gate(message, x, weights, layer.plan), by_autograd(layer, message, x)
    factors = torch.randn(own.shape, dtype=own.dtype, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad((y * factors).sum(), [message, x, *weights]) for y in (own, reference)]
    return relative(own, reference), [relative(a, b) for a, b in zip(*gradients, strict=True)]


@pytest.mark.parametrize("precision", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("l_max", "parity", "is_last"), [(0, False, False), (1, True, False), (2, False, False), (3, False, True)]
)
def test_layers_and_their_gradients(l_max, parity, is_last, precision):
    dtype, bound = precision
    layer = make_layer(l_max, parity, is_last, dtype)
    value, gradients = differences(layer, *inputs(layer.plan, dtype))
    assert value < bound
    assert max(gradients) < 5 * bound


def test_a_wrong_curvature_is_noticed(monkeypatch):
    """The negative twin: the second derivative of the gate enters gradients, and nothing else."""
    right = dual_gate_codegen._scalars

    def wrong(source, irreps):
        return [s._replace(lines=[*s.lines, "f2 = ZERO"]) for s in right(source, irreps)]

    monkeypatch.setattr(dual_gate_codegen, "_scalars", wrong)
    dual_mixing._kernel.cache_clear()
    layer = make_layer(2, False, False, torch.float64)
    value, gradients = differences(layer, *inputs(layer.plan, torch.float64))
    dual_mixing._kernel.cache_clear()
    assert value < 1e-13
    assert max(gradients) > 1e-2


def test_a_wrong_order_of_rows_is_noticed():
    layer = make_layer(2, False, False, torch.float64)
    message, x = inputs(layer.plan, torch.float64)
    wrong = mix_and_gate(message.flip(2), x, list(layer.mix.weights), layer.plan)
    assert relative(wrong, by_autograd(layer, message, x)) > 1e-2


def test_every_row_takes_the_matrix_of_its_irrep():
    irreps = standard_irreps(2, parity=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, irreps_dim(irreps), C, generator=generator, dtype=torch.float64).requires_grad_()
    weights = [torch.randn(C, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in irreps]
    parts = x.split([2 * l + 1 for l, _ in irreps], dim=2)  # noqa: E741
    own, reference = map_rows(x, weights, irreps), torch.cat([p @ w for p, w in zip(parts, weights, strict=True)], 2)
    assert relative(own, reference) < 1e-14
    assert relative(map_rows(x, weights[::-1], irreps), reference) > 1e-2
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, *weights]) for y in (own, reference)), strict=True):
        assert relative(a, b) < 1e-14


def test_no_atoms():
    layer = make_layer(1, False, False, torch.float32)
    message, x = inputs(layer.plan, torch.float32)
    assert mix_and_gate(message[:0], x[:0], list(layer.mix.weights), layer.plan).shape == (0, 2, 4, C)


def test_threads_do_not_matter(set_threads, monkeypatch):
    layer = make_layer(2, False, False, torch.float64)
    message, x = inputs(layer.plan, torch.float64)

    def everything():
        out = mix_and_gate(message, x, list(layer.mix.weights), layer.plan)
        return out.detach(), *torch.autograd.grad(out.square().sum(), [message, x, *layer.mix.weights])

    alone = everything()
    monkeypatch.setattr(dual_mixing, "WORK_PER_THREAD", 1)
    set_threads(3)
    for shared, expected in zip(everything(), alone, strict=True):
        torch.testing.assert_close(shared, expected, rtol=0, atol=1e-12)  # products of matrices are shared otherwise
