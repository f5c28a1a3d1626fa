"""Structures, potentials and backends that every part measures, in full and in small for a quick look on a CPU."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from ase import Atoms
from peers import EQUIVARIANT, TRANSFORMER

from equimd.graph import AtomGraph, batch_graphs, graph_from_arrays
from equimd.kernels import Backend
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.potential import Potential
from equimd.models.transformer import TransformerPotential, TransformerSettings

DENSITY = 192 / 12.4**3
"""Atoms of water per Å³, as in ``peers.py``."""
SPACING = 1.5
"""Å between neighbours of the grid that stands for a molecule."""


@dataclass(frozen=True)
class Options:
    """device: "cuda", "cuda:1" or "cpu"; quick: tiny sizes; peers: folder with the peers' environments, or None."""

    device: str = "cuda"
    quick: bool = False
    peers: Path | None = None

    @property
    def kind(self) -> str:
        """ "cuda" or "cpu"."""
        return torch.device(self.device).type

    @property
    def sizes(self) -> "Sizes":
        """What is small where it is to be quick."""
        return QUICK if self.quick else FULL


class Sizes(NamedTuple):
    """atoms: of periodic boxes, the most telling first; md: of simulations; batches: (frames, atoms, periodic).

    channels, l_max, n_edges: of single convolutions against the reference; block_seconds: how long to measure.
    """

    atoms: tuple[int, ...]
    md: tuple[int, ...]
    batches: tuple[tuple[int, int, bool], ...]
    convolutions: tuple[int, ...]
    models: dict[str, dict[str, Any]]
    channels: tuple[int, ...]
    layers: tuple[tuple[int, bool], ...]
    n_edges: int
    block_seconds: float


FULL = Sizes(
    atoms=(1000, 64, 8000),
    md=(1000, 64, 9),
    batches=((64, 9, False), (8, 192, True), (5, 27, False)),
    convolutions=(8000, 1000, 192),
    models={
        "equivariant, 32 channels": EQUIVARIANT,
        "equivariant, 64 channels": EQUIVARIANT | {"n_channels": 64},
        "transformer, 128 channels": TRANSFORMER,
    },
    channels=(32, 64, 5),
    layers=((2, False), (1, False), (3, False), (1, True), (0, False), (2, True), (0, True), (3, True)),
    n_edges=400,
    block_seconds=0.12,
)
QUICK = Sizes(
    atoms=(27,),
    md=(9,),
    batches=((2, 9, False),),
    convolutions=(27,),
    models={
        "equivariant, 4 channels": {
            "family": "equivariant",
            "cutoff": 3.0,
            "n_layers": 2,
            "l_max": 1,
            "n_channels": 4,
        },
        "transformer, 16 channels": {
            "family": "transformer",
            "cutoff": 3.0,
            "d_model": 16,
            "n_heads": 2,
            "d_feedforward": 16,
            "d_atom_feedforward": 16,
        },
    },
    channels=(4,),
    layers=((1, False),),
    n_edges=30,
    block_seconds=0.005,
)


def backends(options: Options, family: str = "equivariant") -> tuple[Backend, ...]:
    """The kernels to compare for a family, the fastest first."""
    if family == "transformer":
        return (automatic(options),)
    return (*([automatic(options)] if options.kind == "cuda" else []), *convolution_backends(options))


def convolution_backends(options: Options) -> tuple[Backend, ...]:
    """The same for single convolutions, where "auto" is one of the others."""
    compiled = "triton" if options.kind == "cuda" else "llvm"
    known: tuple[Backend, ...] = get_args(Backend)
    return (*(name for name in known if name == compiled), "reference")


def automatic(options: Options) -> Backend:
    """What a user gets on a GPU; networks fused for a CPU take long to compile, and are no matter of this benchmark."""
    return "auto" if options.kind == "cuda" else "reference"


def box(n_atoms: int, seed: int = 0) -> Atoms:
    """Atoms of water's numbers and density on a jittered grid in a periodic cube: none too close, none in order."""
    length = (n_atoms / DENSITY) ** (1 / 3)
    atoms = _on_grid(n_atoms, length / _side(n_atoms), seed)
    atoms.set_cell([length] * 3)
    atoms.pbc = True
    return atoms


def molecule(n_atoms: int, seed: int = 0) -> Atoms:
    """As many atoms, 1.5 Å apart, without a cell."""
    return _on_grid(n_atoms, SPACING, seed)


def _side(n_atoms: int) -> int:
    return int(np.ceil(round(n_atoms ** (1 / 3), 6)))


def _on_grid(n_atoms: int, spacing: float, seed: int) -> Atoms:
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.arange(_side(n_atoms))] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    places = places[np.sort(rng.permutation(len(places))[:n_atoms])]
    numbers = np.where(np.arange(n_atoms) % 3 == 0, 8, 1)
    return Atoms(numbers, spacing * (places + 0.2 * rng.random(places.shape)))


def graph_of(atoms: Atoms, cutoff: float) -> AtomGraph:
    """The graph of a structure, on the CPU."""
    return graph_from_arrays(atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc, cutoff)


@functools.cache
def box_graph(n_atoms: int, cutoff: float, device: str) -> AtomGraph:
    """The graph of ``box`` on a device, made once."""
    graph = graph_of(box(n_atoms), cutoff)
    return graph.to(device)  # pyright: ignore


def batch_graph(n_frames: int, n_atoms: int, periodic: bool, cutoff: float, device: str) -> AtomGraph:
    """Frames of their own as one graph."""
    make = box if periodic else molecule
    batch = batch_graphs([graph_of(make(n_atoms, seed), cutoff) for seed in range(n_frames)])
    return batch.to(device)  # pyright: ignore


def make_potential(settings: dict[str, Any], device: str, dtype: torch.dtype = torch.float32) -> Potential:
    """A potential with the random weights that these settings always get."""
    isolated = {1: 0.0, 8: 0.0}
    rest = {key: value for key, value in settings.items() if key != "family"}
    torch.manual_seed(0)
    if settings["family"] == "transformer":
        potential: Potential = TransformerPotential(TransformerSettings(**rest), (1, 8), isolated)
    else:
        neighbors = max(1.0, DENSITY * 4 / 3 * np.pi * rest["cutoff"] ** 3)
        potential = EquivariantPotential(EquivariantSettings(avg_num_neighbors=neighbors, **rest), (1, 8), isolated)
    return potential.to(device, dtype)
