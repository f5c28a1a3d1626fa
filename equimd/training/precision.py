"""Matrix products of reduced precision, for training only, and what they do to forces and gradients.

``tf32`` and ``bf16`` are torch's float32 matmul precisions "high" and "medium": factors are rounded to 11 and 8
significant bits, sums are of float32. They act where torch multiplies float32 matrices and the hardware can do it:
tf32 on NVIDIA GPUs since Ampere; bf16 on CPUs with such instructions (AMX, AVX-512 BF16), while GPUs compute "medium"
as "high". Compiled kernels, radial functions, edge vectors and energies keep their precision, which is why this is
not autocast: that would hand bfloat16 to kernels that are generated for one type.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from equimd.graph import AtomGraph
from equimd.models.potential import Potential
from equimd.results import Block, Number

PrecisionName = Literal["float32", "tf32", "bf16"]
_SETTING = {"tf32": "high", "bf16": "medium"}


class PrecisionError(Block):
    """What reduced precision does to the same weights and frames: relative RMS of its difference from float32.

    Of forces, and of the gradient of their mean square with respect to the weights.
    """

    forces: Number
    gradient: Number


class PrecisionReport(Block):
    """The precision that a training asked for, and its error before the first and after the last step."""

    setting: PrecisionName
    start: PrecisionError
    end: PrecisionError


@contextmanager
def matmul_precision(name: PrecisionName) -> Iterator[None]:
    """Let torch multiply float32 matrices in this precision inside the block; "float32" changes nothing."""
    if name == "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_SETTING[name])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def precision_error(potential: Potential, graph: AtomGraph, name: PrecisionName) -> PrecisionError:
    """The error of ``name`` for a potential, on a graph, by the way that training takes."""
    exact = _forces_and_gradient(potential, graph)
    with matmul_precision(name):
        reduced = _forces_and_gradient(potential, graph)
    return PrecisionError(forces=_relative_rms(reduced[0], exact[0]), gradient=_relative_rms(reduced[1], exact[1]))


def _forces_and_gradient(potential: Potential, graph: AtomGraph) -> tuple[Tensor, Tensor]:
    forces = potential.predict_trainable(graph).forces
    parameters = [p for p in potential.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(forces.square().mean(), parameters, allow_unused=True)
    return forces.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


def _relative_rms(value: Tensor, exact: Tensor) -> float:
    scale = float(exact.double().norm())
    return float((value - exact).double().norm()) / scale if scale > 0 else math.nan
