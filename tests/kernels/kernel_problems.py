from dataclasses import dataclass

import torch
from torch import Tensor

from equimd.kernels import ConvolutionPlan, make_layer_plan


@dataclass
class Problem:
    """Random arguments of one convolution; receivers unsorted, and the last atom without edges."""

    plan: ConvolutionPlan
    x: Tensor
    sh: Tensor
    radial: Tensor
    senders: Tensor
    receivers: Tensor

    @property
    def floats(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.sh, self.radial

    @property
    def rest(self) -> tuple[Tensor, Tensor, ConvolutionPlan]:
        return self.senders, self.receivers, self.plan


def make_problem(
    plan: ConvolutionPlan | None = None,
    dtype: torch.dtype = torch.float64,
    n_atoms: int = 7,
    n_edges: int = 30,
    n_channels: int = 4,
    requires_grad: bool = False,
) -> Problem:
    plan = make_layer_plan(2) if plan is None else plan
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(requires_grad)

    connected = max(n_atoms - 1, 1)
    return Problem(
        plan,
        random(n_atoms, plan.dim_in, n_channels),
        random(n_edges, plan.dim_sh),
        random(n_edges, plan.n_paths, n_channels),
        torch.randint(0, connected, (n_edges,), generator=generator),
        torch.randint(0, connected, (n_edges,), generator=generator),
    )
