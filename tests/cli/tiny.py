"""Structures and tiny potentials for the commands."""

from ase import Atoms

from equimd.models.equivariant import EquivariantSettings
from equimd.models.transformer import TransformerSettings

SETTINGS = {
    "equivariant": EquivariantSettings(cutoff=4.0, n_layers=1, l_max=1, n_channels=4),
    "transformer": TransformerSettings(cutoff=4.0, d_model=8, n_gnn_layers=1, d_feedforward=8),
}
ISOLATED = {1: -10.7, 8: -102.5}


def water() -> Atoms:
    return Atoms("OH2", positions=[[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
