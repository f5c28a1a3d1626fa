"""Ways to compute the tensor product of node features with spherical harmonics, summed over the edges into a node.

All take a ``Problem``; ``gaunt`` computes something else than the others, see ``tensor_product``.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from convolution import N_CHANNELS, Problem
from scipy.integrate import lebedev_rule
from torch import Tensor

from equimd.kernels import convolve
from equimd.kernels.codegen import path_terms
from equimd.kernels.harmonics import spherical_harmonics

LEBEDEV_ORDERS = (3, 5, 7, 9, 11)  # with positive weights


@dataclass(frozen=True)
class Contestant:
    """A product with its arguments in the layout it prefers; ``unpack`` takes outputs and gradients to the plan's."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, Tensor, Tensor]
    gradient: Tensor
    unpack: Callable[[Tensor, str], Tensor]

    def forward(self) -> Tensor:
        """The product."""
        with torch.no_grad():
            return self.call(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        """The product's gradients with respect to features, harmonics and weights."""
        return torch.autograd.grad(self.call(*self.inputs), self.inputs, self.gradient)


def _as_it_is(rows: Tensor, _which: str) -> Tensor:
    return rows


def dense(problem: Problem) -> Contestant:
    """One einsum with harmonics, one with features, over all D_in · D_sh · D_out coefficients."""
    plan, topology = problem.plan, problem.topology
    cg = torch.zeros(plan.dim_in, plan.dim_sh, plan.dim_out)
    for path in plan.paths:
        cg[path.in_rows, path.sh_rows, path.out_rows] = torch.from_numpy(path.cg.copy()).float()
    path_of_row = torch.tensor([p.weight_index for p in plan.paths for _ in range(2 * p.l3 + 1)])

    def call(x: Tensor, sh: Tensor, radial: Tensor) -> Tensor:
        coupling = torch.einsum("ej,ijk->eik", sh, cg)
        message = torch.einsum("eik,eic->ekc", coupling, x.index_select(0, topology.senders))
        return _scatter(message * radial.index_select(1, path_of_row), problem)

    return Contestant(call, problem.floats, problem.gradient, _as_it_is)


def sparse(problem: Problem) -> Contestant:
    """Row by row of the output, a multiply-add for every pair (i, k) that some harmonic couples."""
    plan, topology = problem.plan, problem.topology

    def call(x: Tensor, sh: Tensor, radial: Tensor) -> Tensor:
        gathered = x.index_select(0, topology.senders).unbind(1)
        y = sh.unsqueeze(2).unbind(1)
        rows: list[Tensor] = []
        for path in plan.paths:
            sums: dict[int, Tensor] = {}
            for i, k, coupled in path_terms(path):
                terms = [value * y[path.sh_offset + j] for j, value in coupled]
                coupling, row = sum(terms[1:], terms[0]), gathered[path.in_offset + i]
                sums[k] = torch.addcmul(sums[k], coupling, row) if k in sums else coupling * row
            rows += [sums[k] * radial[:, path.weight_index] for k in range(2 * path.l3 + 1)]
        return _scatter(torch.stack(rows, dim=1), problem)

    return Contestant(call, problem.floats, problem.gradient, _as_it_is)


def e3nn(problem: Problem) -> Contestant:
    """TensorProduct with one 'uvu' instruction per path; the components of a channel lie side by side."""
    from e3nn import o3

    plan, topology, c = problem.plan, problem.topology, N_CHANNELS
    irreps_in = o3.Irreps([(c, irrep) for irrep in plan.irreps_in])
    irreps_out = o3.Irreps([(c, (p.l3, p.p3)) for p in plan.paths])
    instructions = [(plan.irreps_in.index((p.l1, p.p1)), p.l2, k, "uvu", True, 1.0) for k, p in enumerate(plan.paths)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, by which e3nn compiles
        product = o3.TensorProduct(
            irreps_in,
            o3.Irreps.spherical_harmonics(plan.l_max_sh),
            irreps_out,
            instructions,
            irrep_normalization="component",
            path_normalization="none",
            internal_weights=False,
            shared_weights=False,
        )

    def pack(rows: Tensor, degrees: list[int]) -> Tensor:
        blocks = rows.split([2 * l + 1 for l in degrees], dim=1)  # noqa: E741
        return torch.cat([block.transpose(1, 2).flatten(1) for block in blocks], dim=1)

    def unpack(rows: Tensor, which: str) -> Tensor:
        if which in ("sh", "radial"):
            return rows.view_as(getattr(problem, which))
        degrees = [p.l3 for p in plan.paths] if which == "out" else [l for l, _ in plan.irreps_in]  # noqa: E741
        blocks = rows.split([c * (2 * l + 1) for l in degrees], dim=1)  # noqa: E741
        return torch.cat([block.unflatten(1, (c, -1)).transpose(1, 2) for block in blocks], dim=1)

    def call(x: Tensor, sh: Tensor, radial: Tensor) -> Tensor:
        return _scatter(product(x.index_select(0, topology.senders), sh, radial), problem)

    x, sh, radial = (tensor.detach() for tensor in problem.floats)
    packed = (pack(x, [l for l, _ in plan.irreps_in]), sh.clone(), radial.flatten(1).clone())  # noqa: E741
    inputs = (packed[0].requires_grad_(), packed[1].requires_grad_(), packed[2].requires_grad_())
    return Contestant(call, inputs, pack(problem.gradient, [p.l3 for p in plan.paths]), unpack)


def equimd(problem: Problem) -> Contestant:
    """This package's."""

    def call(x: Tensor, sh: Tensor, radial: Tensor) -> Tensor:
        topology = problem.topology
        edges = topology.senders, topology.receivers
        return convolve(x, sh, radial, *edges, problem.plan, backend="llvm", topology=topology)

    return Contestant(call, problem.floats, problem.gradient, _as_it_is)


def gaunt(problem: Problem) -> Contestant:
    """On a Lebedev grid; radial (E, l_max + 1, C) and outputs (N, (l_max+1)², C) by degree of the output."""
    plan, topology = problem.plan, problem.topology
    values, weights = (tensor.float() for tensor in sphere(plan.l_max_sh))
    back = (values * weights.unsqueeze(1)).T  # (D_sh, G)
    degree_of_row = torch.tensor([l for l in range(plan.l_max_sh + 1) for _ in range(2 * l + 1)])  # noqa: E741

    def call(x: Tensor, sh: Tensor, radial: Tensor) -> Tensor:
        features = torch.matmul(values, x)  # (N, G, C): a node's once, not for every edge
        product = features.index_select(0, topology.senders) * (sh @ values.T).unsqueeze(2)
        return _scatter(torch.matmul(back, product) * radial.index_select(1, degree_of_row), problem)

    generator = torch.Generator().manual_seed(1)
    radial = torch.randn(topology.n_edges, plan.l_max_sh + 1, N_CHANNELS, generator=generator).requires_grad_()
    gradient = torch.randn(len(problem.x), plan.dim_sh, N_CHANNELS, generator=generator)
    return Contestant(call, (problem.x, problem.sh, radial), gradient, _as_it_is)


def _scatter(message: Tensor, problem: Problem) -> Tensor:
    zeros = message.new_zeros(problem.topology.n_receivers, *message.shape[1:])
    return zeros.index_add(0, problem.topology.receivers, message)


def sphere(l_max: int) -> tuple[Tensor, Tensor]:
    """Harmonics (G, (l_max+1)²) and weights (G,), summing to 1, on a grid exact for products of three; float64."""
    points, weights = lebedev_rule(min(order for order in LEBEDEV_ORDERS if order >= 3 * l_max))
    return spherical_harmonics(torch.from_numpy(points.T.copy()), l_max), torch.from_numpy(weights / weights.sum())


CONTESTANTS = {"dense": dense, "sparse": sparse, "e3nn": e3nn, "equimd": equimd, "Gaunt": gaunt}
