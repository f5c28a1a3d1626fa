"""The ensemble is the mean of its members, in everything."""

import numpy as np
import pytest
import torch

from equimd.errors import InputError
from equimd.graph import batch_graphs, graph_from_arrays
from equimd.models.ensemble import EnsemblePotential
from equimd.models.transformer import TransformerPotential, TransformerSettings

CUTOFF = 3.0
CELL = np.array([[3.9, 0.2, 0.0], [0.6, 4.1, -0.3], [0.1, 0.5, 3.7]])


def member(seed: int, species: tuple[int, ...] = (1, 8), **settings: object) -> TransformerPotential:
    torch.manual_seed(seed)
    options = {"cutoff": CUTOFF, "d_model": 8, "n_heads": 2, "d_feedforward": 8, "n_radial": 3, **settings}
    return TransformerPotential(TransformerSettings(**options), species, {z: -z - 0.1 * seed for z in species}).double()


def frames():
    rng = np.random.default_rng(0)
    molecule = np.array([[0.0, 0.0, 0.0], [0.9, 0.1, 0.3], [-0.4, 0.8, 0.1]])
    crystal = rng.uniform(0, 1, (2, 3)) @ CELL
    return batch_graphs(
        [
            graph_from_arrays(molecule, np.array([8, 1, 1]), np.zeros((3, 3)), np.zeros(3, bool), CUTOFF),
            graph_from_arrays(crystal, np.array([8, 1]), CELL, np.ones(3, bool), CUTOFF),
        ]
    )


@pytest.mark.parametrize("direct", [False, True])
def test_mean_and_spread(direct):
    members, graph = [member(k, direct_forces=direct) for k in range(3)], frames()
    ensemble = EnsemblePotential(members)
    predictions = [m(graph, stress=True) for m in members]
    mean = ensemble(graph, stress=True)
    for what in ("energy", "energies", "forces"):
        expected = torch.stack([getattr(p, what) for p in predictions]).mean(0)
        assert torch.allclose(getattr(mean, what), expected, rtol=0, atol=1e-12)
    assert torch.allclose(mean.stress[1], torch.stack([p.stress[1] for p in predictions]).mean(0), rtol=0, atol=1e-12)
    spread = ensemble.spread(graph)
    forces = torch.stack([p.forces for p in predictions])
    assert torch.allclose(spread.forces, forces.std(0), rtol=0, atol=1e-12)
    assert spread.energy.shape == (2,)
    assert (spread.forces > 0).any()


def test_equal_members_have_no_spread():
    members = [member(1), member(1)]
    graph = frames()
    spread = EnsemblePotential(members).spread(graph)
    assert (spread.forces == 0).all()
    assert (spread.energy == 0).all()
    assert torch.allclose(EnsemblePotential(members)(graph).forces, members[0](graph).forces, rtol=0, atol=1e-13)


def test_different_members_are_refused():
    with pytest.raises(InputError, match="at least 2"):
        EnsemblePotential([member(0)])
    with pytest.raises(InputError, match="species of ensemble member 1"):
        EnsemblePotential([member(0), member(1, species=(1, 6, 8))])
    with pytest.raises(InputError, match="direct_forces of ensemble member 1"):
        EnsemblePotential([member(0), member(1, direct_forces=True)])
    with pytest.raises(InputError, match="dtype of ensemble member 1"):
        EnsemblePotential([member(0), member(1).float()])
