from dataclasses import dataclass

import torch
from torch import Tensor

from equimd.kernels import ConvolutionPlan, convolve, make_layer_plan


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
    device: str = "cpu",
) -> Problem:
    plan = make_layer_plan(2) if plan is None else plan
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return values.requires_grad_(requires_grad)

    connected = max(n_atoms - 1, 1)
    return Problem(
        plan,
        random(n_atoms, plan.dim_in, n_channels),
        random(n_edges, plan.dim_sh),
        random(n_edges, plan.n_paths, n_channels),
        torch.randint(0, connected, (n_edges,), generator=generator).to(device),
        torch.randint(0, connected, (n_edges,), generator=generator).to(device),
    )


def relative_error(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def hessian_vector_product(backend, n_atoms=7, n_edges=30, device="cpu"):
    """Of a force loss: third derivatives of the convolution, all arguments depending on positions and parameters."""
    problem = make_problem(make_layer_plan(1), n_atoms=n_atoms, n_edges=n_edges, n_channels=2, device=device)
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    vectors, theta = random(n_edges, 3).requires_grad_(), random(2).requires_grad_()
    direction = random(2)
    sh = torch.cat([torch.ones_like(vectors[:, :1]), vectors * 3**0.5], dim=1)
    radial = problem.radial * torch.sin(theta[0] * vectors.square().sum(1))[:, None, None]
    x = torch.tanh(theta[1] * problem.x)
    x = x + convolve(x, sh, radial, *problem.rest, backend=backend)[:, :4]
    energy = convolve(x, sh, radial, *problem.rest, backend=backend).cos().sum()
    (force,) = torch.autograd.grad(energy, vectors, create_graph=True)
    (gradient,) = torch.autograd.grad(force.square().sum(), theta, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ direction, theta)
    return product
