"""Small potentials and structures for the tests of frozen networks and of training."""

import itertools

import numpy as np
import torch

from equimd import kernels
from equimd.graph import graph_from_arrays
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.transformer import TransformerPotential, TransformerSettings

ISOLATED = {1: -13.0, 8: -400.0}
THREE = {**ISOLATED, 6: -150.0}
CUTOFF = 3.5


def make_potential(dtype=torch.float64, **settings):
    torch.manual_seed(4)
    defaults = {"n_channels": 8, "n_layers": 2, "cutoff": CUTOFF, "avg_num_neighbors": 9.0}
    potential = EquivariantPotential(EquivariantSettings(**(defaults | settings)), (1, 8), ISOLATED)
    potential.set_scale_shift({1: 1.5, 8: 0.7}, {1: 0.1, 8: -0.2})
    return potential.to(dtype).requires_grad_(False)


def make_graph(n=12, length=6.0, pbc=True, seed=0, cutoff=CUTOFF, third=1):
    rng = np.random.default_rng(seed)
    cell = length * np.array([[1.0, 0.1, 0.0], [-0.2, 0.9, 0.1], [0.0, 0.3, 1.1]])
    # On a jittered grid: no two atoms so close that the repulsion drowns everything else.
    side = int(np.ceil(n ** (1 / 3)))
    places = np.array(list(itertools.product(range(side), repeat=3)))[:n]
    positions = ((places + 0.25 * rng.random((n, 3))) / side) @ cell
    numbers = np.array([8, 1, third])[np.arange(n) % 3]
    return graph_from_arrays(positions, numbers, cell, np.full(3, pbc), cutoff)


def both(potential, graph, stress=True):
    assert potential.has_frozen_network
    fast = potential(graph, stress=stress)
    with kernels.using("reference"):
        assert not potential.has_frozen_network
        slow = potential(graph, stress=stress)
    return fast, slow


def largest_difference(fast, slow):
    """Relative to the largest value, over atomic energies, forces and stress."""
    pairs = [(fast.energies, slow.energies), (fast.forces, slow.forces)]
    if slow.stress is not None:
        pairs.append((fast.stress.nan_to_num(), slow.stress.nan_to_num()))
    return float(
        np.max([float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs])
    )  # NaN if any is


def make_transformer(dtype=torch.float64, isolated=ISOLATED, **settings):
    torch.manual_seed(4)
    defaults = {"d_model": 32, "n_heads": 2, "d_feedforward": 48, "n_radial": 5, "cutoff": CUTOFF}
    species = tuple(sorted(isolated))
    potential = TransformerPotential(TransformerSettings(**(defaults | settings)), species, isolated)
    potential.set_scale_shift({1: 1.5, 6: 1.1, 8: 0.7}, {1: 0.1, 6: 0.3, 8: -0.2})
    for bias in (head.bias for head in potential.atom_heads):
        torch.nn.init.normal_(bias)
    return potential.to(dtype).requires_grad_(False)


def loss(prediction):
    """Of everything that can be trained on, with weights that are not symmetric."""
    terms = [prediction.energy.square().sum() * 1e-6, prediction.energies.square().sum()]
    terms += [prediction.forces.square().sum(), prediction.forces.select(1, 0).sum()]
    if prediction.stress is not None:
        terms.append((prediction.stress * torch.arange(9.0).view(3, 3)).square().sum() * 1e3)
    return sum(terms)


def gradients(potential, prediction):
    """Of that loss, by parameter."""
    potential.zero_grad()
    loss(prediction).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in potential.named_parameters()}


def gradient_difference(a, b):
    """Relative to the largest of each parameter's gradient."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
    known = [name for name in a if b[name] is not None]
    scale = {name: b[name].abs().max().clamp(min=1e-12) for name in known}  # some weights reach nothing
    return float(np.max([float((a[name] - b[name]).abs().max() / scale[name]) for name in known]))
