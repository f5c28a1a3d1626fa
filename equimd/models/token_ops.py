"""The transformer's three nonlinear operations, with first and second derivatives in closed form.

RMSNorm, SwiGLU and attention with cutoff weights. Training on forces differentiates each of them twice; written out,
the derivatives take fewer tensor operations than autograd would compose, which is what small systems wait for. Each
operation is a function f(x), its gradient G(g, x) = gᵀ ∂f/∂x a second one, and the backward pass of G is the end: third
derivatives are refused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def rms_norm(x: Tensor) -> Tensor:
    """x / √(mean(x²) + 10⁻⁶) over the last dimension (Zhang & Sennrich 2019), without a gain."""
    return _RMSNorm.apply(x)  # type: ignore[return-value]


def swiglu(x: Tensor) -> Tensor:
    """silu(a) ⊙ b (..., F) for x = [a, b] (..., 2F) (Shazeer 2020)."""
    return _SwiGLU.apply(x)  # type: ignore[return-value]


def attention(qkv: Tensor, weights: Tensor, n_heads: int) -> Tensor:
    """Weighted attention over the tokens of each atom: α_ab = w_b exp(q_a·k_b/√D) / Σ_c w_c exp(q_a·k_c/√D).

    qkv (N, T, 3·H·D): queries, keys and values of H heads; weights (N, T) ≥ 0, at least one of each row positive.
    Returns Σ_b α_ab v_b as (N, T, H·D). The exponentials are multiplied by the weights: log w in the exponent would
    give NaN in second derivatives where w = 0.
    """
    return _Attention.apply(qkv, weights, n_heads)  # type: ignore[return-value]


def _refuse_third_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("third derivatives of the transformer are not available; two are")


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(1e-6))
        y = x * scale
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _RMSNormGradient.apply(*gradients, *ctx.saved_tensors)  # type: ignore[return-value]


class _RMSNormGradient(Function):
    """s (g − a y) with s the scale and a = mean(g y)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        a = (g * y).mean(-1, keepdim=True)
        ctx.save_for_backward(g, y, scale, a)
        return torch.addcmul(g, y, a, value=-1).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _refuse_third_derivatives()
        (h,), (g, y, scale, a) = gradients, ctx.saved_tensors
        b = (h * y).mean(-1, keepdim=True)
        c = (h * g).mean(-1, keepdim=True)
        to_g = torch.addcmul(h, y, b, value=-1).mul_(scale)
        to_x = (y * (3 * a * b - c)).addcmul_(g, b, value=-1).addcmul_(h, a, value=-1).mul_(scale * scale)
        return to_g, to_x, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        s = torch.sigmoid(a)
        u = a * s  # silu(a)
        ctx.save_for_backward(x, s, u)
        return u * b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SwiGLUGradient.apply(*gradients, *ctx.saved_tensors)  # type: ignore[return-value]


class _SwiGLUGradient(Function):
    """[g b u', g u] with u = a s, u' = s + u (1 − s), u'' = (1 − s)(s + u' − u s), s = sigmoid(a)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, s: Tensor, u: Tensor) -> Tensor:
        b = x.chunk(2, -1)[1]
        slope = torch.addcmul(s, u, 1 - s)
        out = torch.empty_like(x)
        to_a, to_b = out.chunk(2, -1)
        torch.mul(g, b, out=to_a).mul_(slope)
        torch.mul(g, u, out=to_b)
        ctx.save_for_backward(g, x, s, u, slope)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _refuse_third_derivatives()
        (h,), (g, x, s, u, slope) = gradients, ctx.saved_tensors
        b = x.chunk(2, -1)[1]
        h_a, h_b = h.chunk(2, -1)
        curvature = torch.addcmul(s + slope, u, s, value=-1).mul_(1 - s)
        to_x = torch.empty_like(x)
        to_a, to_b = to_x.chunk(2, -1)
        hb = h_a * b
        torch.mul(h_a, g, out=to_b).mul_(slope)
        torch.mul(hb, curvature, out=to_a).addcmul_(h_b, slope).mul_(g)
        return hb.mul_(slope).addcmul_(h_b, u), to_x, None, None


def _split(x: Tensor, n: int, n_heads: int) -> Tensor:
    """(N, T, n·H·D) → contiguous (n, N·H, T, D)."""
    n_atoms, t, width = x.shape
    d = width // (n * n_heads)
    return x.view(n_atoms, t, n, n_heads, d).permute(2, 0, 3, 1, 4).reshape(n, n_atoms * n_heads, t, d)


def _merge(x: Tensor, n_atoms: int) -> Tensor:
    """(n, N·H, T, D) → (N, T, n·H·D): the inverse of ``_split``."""
    n, _, t, d = x.shape
    return x.view(n, n_atoms, -1, t, d).permute(1, 3, 0, 2, 4).reshape(n_atoms, t, -1)


class _Attention(Function):
    """o = P v with P = R w, R = exp(S) / Σ w exp(S), S = q kᵀ/√D; matrices (N·H, T, T)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, weights: Tensor, n_heads: int) -> Tensor:
        parts = _split(qkv, 3, n_heads)
        q, k, v = parts
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
        # The largest logit is taken out against overflow; it cancels in the ratio.
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        w = weights.repeat_interleave(n_heads, 0).unsqueeze(1)  # (N·H, 1, T)
        scores.mul_(torch.bmm(scores, w.transpose(1, 2)).reciprocal_())
        ctx.save_for_backward(qkv, weights, parts, scores, w)
        return _merge(torch.bmm(scores * w, v).unsqueeze(0), len(qkv))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        to_qkv, to_weights = _AttentionGradient.apply(*gradients, *ctx.saved_tensors)  # type: ignore[misc]
        return to_qkv, to_weights, None


class _AttentionGradient(Function):
    """With A = g vᵀ, B = A − rowsum(P A) and Z = P B: [Z k/√D, Zᵀ q/√D, Pᵀ g] and Σ_rows,heads R B."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, qkv: Tensor, weights: Tensor, parts: Tensor, r: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        n_atoms, t = weights.shape
        n_heads = len(w) // n_atoms
        q, k, v = parts
        gradient = _split(g, 1, n_heads)[0]
        p = r * w
        a = torch.bmm(gradient, v.transpose(1, 2))
        b = a - (p * a).sum(-1, keepdim=True)
        z = p * b
        scale = q.shape[-1] ** -0.5
        out = torch.empty_like(parts)
        torch.bmm(z, k * scale, out=out[0])
        torch.bmm(z.transpose(1, 2), q * scale, out=out[1])
        torch.bmm(p.transpose(1, 2), gradient, out=out[2])
        ctx.save_for_backward(parts, gradient, r, w, a, b)
        return _merge(out, n_atoms), (r * b).view(n_atoms, -1, t).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        _refuse_third_derivatives()
        (h, h_weights), (parts, g, r, w, a, b) = gradients, ctx.saved_tensors
        n_atoms, t = h_weights.shape
        n_heads = len(w) // n_atoms
        q, k, v = parts
        h_q, h_k, h_v = _split(h, 3, n_heads)
        scale = q.shape[-1] ** -0.5
        p = r * w
        # y: what multiplies R B in the scalar <h, gradient>; x: what multiplies P, through the values.
        u = torch.baddbmm(torch.bmm(h_q, k.transpose(1, 2)), q, h_k.transpose(1, 2)).mul_(scale)
        y = torch.addcmul(h_weights.repeat_interleave(n_heads, 0).unsqueeze(1), u, w)
        to_b = r * y
        total = to_b.sum(-1, keepdim=True)
        to_a = torch.addcmul(to_b, p, total, value=-1)
        to_p = torch.baddbmm(a * total, g, h_v.transpose(1, 2), beta=-1)
        to_r = torch.addcmul(y.mul_(b), to_p, w)
        ratio = (to_r * r).sum(-1, keepdim=True)
        to_s = to_r.mul_(r).addcmul_(p, ratio, value=-1)
        z = p.mul(b)
        out = torch.empty_like(parts)
        torch.baddbmm(torch.bmm(z, h_k), to_s, k, out=out[0])
        torch.baddbmm(torch.bmm(z.transpose(1, 2), h_q), to_s.transpose(1, 2), q, out=out[1])
        out[:2].mul_(scale)
        torch.bmm(to_a.transpose(1, 2), g, out=out[2])
        to_w = u.mul_(b).add_(to_p).sub_(ratio).mul_(r).view(n_atoms, -1, t).sum(1)
        to_g = torch.baddbmm(torch.bmm(p, h_v), to_a, v)
        return _merge(to_g.unsqueeze(0), n_atoms), _merge(out, n_atoms), to_w, None, None, None
