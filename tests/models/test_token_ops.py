"""Closed-form first and second derivatives of the transformer's operations, against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from equimd.models.token_ops import attention, rms_norm, swiglu


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("operation", [rms_norm, swiglu])
def test_derivatives(operation):
    x = random(3, 2, 6).requires_grad_()
    assert gradcheck(operation, x)
    assert gradgradcheck(operation, x)


def test_derivatives_of_attention():
    qkv, weights = random(2, 3, 12).requires_grad_(), random(2, 3).abs()
    weights[0, 1] = 0.0  # beyond the cutoff: finite-difference steps to both sides of zero are smooth too
    weights.requires_grad_()
    assert gradcheck(lambda x, w: attention(x, w, 2), (qkv, weights))
    assert gradgradcheck(lambda x, w: attention(x, w, 2), (qkv, weights))


def test_attention_equals_torch_with_unit_weights_and_masks():
    qkv = random(2, 5, 24)
    q, k, v = qkv.view(2, 5, 3, 4, 2).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8)
    weights = torch.ones(2, 5, dtype=torch.float64)
    assert torch.allclose(attention(qkv, weights, 4), expected, rtol=0, atol=1e-12)
    weights[:, 3:] = 0.0
    assert torch.allclose(attention(qkv, weights, 4)[:, :3], attention(qkv[:, :3], weights[:, :3], 4), atol=1e-12)
    assert not torch.allclose(attention(qkv, weights, 4), expected, atol=1e-3)


def test_large_logits_stay_finite():
    qkv = (random(1, 3, 6) * 100).float().requires_grad_()
    out = attention(qkv, torch.ones(1, 3), 1)
    (gradient,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    gradient.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(qkv.grad).all()


def test_swiglu_and_norm_values():
    x = random(4, 6)
    a, b = x.chunk(2, -1)
    assert torch.allclose(swiglu(x), torch.nn.functional.silu(a) * b, atol=1e-14)
    assert torch.allclose(rms_norm(x), torch.nn.functional.rms_norm(x, (6,), eps=1e-6), atol=1e-14)


def test_third_derivatives_are_refused():
    x = random(2, 4).requires_grad_()
    (first,) = torch.autograd.grad(rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(first.sum(), x, create_graph=True)
