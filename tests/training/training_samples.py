"""Small labelled data sets and recipes; the labels are those of a spring model, so that there is something to learn."""

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.graph import batch_graphs, graph_from_arrays
from equimd.models.container import read_tensors
from equimd.training.state import FORMAT

E0 = {"H": -10.0, "C": -48.0, "O": -102.0}


def spring_frames(n: int, seed: int, names=("H2O", "CH4", "CH3OH")) -> list[Atoms]:
    """Rattled molecules with the energy and forces of Hooke's springs (2 eV/Å²) between all pairs."""
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(n):
        atoms = molecule(names[k % len(names)])
        rest = atoms.get_all_distances()
        atoms.rattle(0.08, rng=rng)
        vectors = atoms.positions[None] - atoms.positions[:, None]  # i → j
        distances = np.linalg.norm(vectors, axis=2) + np.eye(len(atoms))
        stretch = (distances - rest) * (1 - np.eye(len(atoms)))
        energy = 0.5 * np.sum(stretch**2) + sum(E0[s] for s in atoms.get_chemical_symbols())
        forces = 2.0 * np.sum((stretch / distances)[:, :, None] * vectors, axis=1)
        atoms.calc = SinglePointCalculator(atoms, energy=float(energy), forces=forces)
        frames.append(atoms)
    return frames


TINY = {
    "transformer": {
        "family": "transformer",
        "cutoff": 3.0,
        "d_model": 8,
        "n_heads": 2,
        "n_gnn_layers": 1,
        "n_attention_layers": 1,
        "d_feedforward": 8,
        "n_radial": 4,
        "zbl": False,
    },
    "equivariant": {
        "family": "equivariant",
        "cutoff": 3.0,
        "n_layers": 2,
        "l_max": 1,
        "n_channels": 4,
        "n_bessel": 4,
        "radial_width": 8,
        "zbl": False,
    },
}


def steps_of(run: Path) -> int:
    """Those of the state of a training; -1 without one."""
    state = run / "state.safetensors"
    return read_tensors(state, FORMAT)[0]["progress"]["step"] if state.exists() else -1


def labelled_graph(potential):
    """Two periodic structures, labelled by the potential itself."""
    rng = np.random.default_rng(0)
    graphs = []
    for _ in range(2):
        cell = 4.0 * np.eye(3) + rng.normal(0, 0.2, (3, 3))
        positions = np.array([[0.1, 0, 0], [1.2, 0.1, 0], [0, 1.9, 1.0], [2.0, 2.1, 2.9]]) + rng.normal(0, 0.05, (4, 3))
        graphs.append(graph_from_arrays(positions, np.array([1, 6, 8, 1]), cell, np.ones(3, bool), potential.cutoff))
    graph = batch_graphs(graphs)
    prediction = potential(graph, stress=True)
    graph.energy, graph.forces, graph.stress = prediction.energy, prediction.forces, prediction.stress
    return graph
