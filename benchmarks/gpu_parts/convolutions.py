"""Part 6: single convolutions of the graph of a box: forward, gradient of features, gradients of edges."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equimd import kernels
from equimd.models.potential import topology_of
from gpu_parts.runner import Case
from gpu_parts.systems import Options, box_graph, convolution_backends
from gpu_parts.timing import measure

CUTOFF = 5.0
DIRECTIONS = ("forward", "grad_x", "grad_yw")


def cases(options: Options) -> list[Case]:
    """The convolution of a hidden layer in float32, by every backend."""
    l_max = 1 if options.quick else 2
    channels = sorted(
        {settings["n_channels"] for settings in options.sizes.models.values() if "n_channels" in settings}
    )
    return [
        Case(
            {"layer": f"l_max {l_max}, {c} channels", "atoms": n_atoms, "direction": direction, "backend": backend},
            partial(_direction, options, n_atoms, c, l_max, direction, backend),
        )
        for n_atoms in options.sizes.convolutions
        for c in channels
        for backend in convolution_backends(options)
        for direction in DIRECTIONS
    ]


def _direction(
    options: Options, n_atoms: int, n_channels: int, l_max: int, direction: str, backend: kernels.Backend
) -> dict[str, Any]:
    """Time of one direction, through autograd as networks call it; rates of what it must move and do at least.

    Bytes are each array once: features, harmonics, weights, two indices an edge, what comes in and what comes out.
    Floating point operations are 2 for each of ``plan.n_terms`` coefficients, edge and channel; twice as many for the
    two gradients of edges.
    """
    plan = kernels.make_layer_plan(l_max)
    x, sh, radial, g, convolve = _problem(options, n_atoms, n_channels, l_max, backend)
    if direction == "forward":
        call = _without_graph(convolve, x, sh, radial)
    else:
        inputs = [x] if direction == "grad_x" else [sh, radial]
        out = convolve(*(t.requires_grad_(any(t is i for i in inputs)) for t in (x, sh, radial)))
        call = partial(torch.autograd.grad, out, inputs, g, retain_graph=True)
    timing = measure(call, options.device, options.sizes.block_seconds)
    n_edges = sh.shape[0]
    # "forward" writes what has the shape of g, "grad_x" what has that of x.
    n_bytes = _bytes(x, sh, radial, g) + 2 * 8 * n_edges + (direction == "grad_yw") * _bytes(sh, radial)
    n_flop = (4 if direction == "grad_yw" else 2) * plan.n_terms * n_edges * n_channels
    rates = {"gb_per_s": n_bytes / timing["ms"] / 1e6, "gflop_per_s": n_flop / timing["ms"] / 1e6}
    return timing | {"edges": n_edges, "mb": n_bytes / 1e6, "gflop": n_flop / 1e9} | rates


def _problem(
    options: Options, n_atoms: int, n_channels: int, l_max: int, backend: kernels.Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[..., Tensor]]:
    plan = kernels.make_layer_plan(l_max)
    graph = box_graph(n_atoms, CUTOFF, options.device)
    topology = topology_of(graph)
    generator = torch.Generator(options.device).manual_seed(0)
    random = functools.partial(torch.randn, device=options.device, generator=generator)
    x, g = random(n_atoms, plan.dim_in, n_channels), random(n_atoms, plan.dim_out, n_channels)
    sh, radial = random(graph.n_edges, plan.dim_sh), random(graph.n_edges, plan.n_paths, n_channels)
    edges = {"senders": topology.senders, "receivers": topology.receivers, "plan": plan, "topology": topology}
    return x, sh, radial, g, partial(kernels.convolve, **edges, backend=backend)


def _without_graph(convolve: Callable[..., Tensor], *arrays: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return convolve(*arrays)

    return call


def _bytes(*arrays: Tensor) -> int:
    return sum(a.numel() * a.element_size() for a in arrays)
