"""equimd as a worker of the peer benchmark."""

import numpy as np
import torch
from worker import device_of, serve, structure


def setup(task):
    """One call of the work named in ``task``."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    potential = _potential(task).to(device_of(task))
    potential.kernel_backend = task.get("kernels", "auto")
    facts = {"parameters": sum(p.numel() for p in potential.parameters())}
    numbers, positions, length = structure(task)
    if task["work"] == "train":
        return _training_step(potential, task, numbers, positions), facts
    if task["work"] == "ase":
        return _ase_call(potential, task, numbers, positions, length), facts
    from equimd.graph import graph_from_arrays

    potential.requires_grad_(False)
    cell, pbc = np.eye(3) * (length or 0.0), np.full(3, length is not None)
    graph = graph_from_arrays(positions, numbers, cell, pbc, potential.cutoff).to(device_of(task))
    facts["edges"] = graph.n_edges
    if "matmul_precision" in task:
        exact = potential(graph).forces
        torch.set_float32_matmul_precision(task["matmul_precision"])
        difference = potential(graph).forces - exact
        facts["relative_force_error"] = float(difference.square().mean().sqrt() / exact.square().mean().sqrt())
    return lambda: potential(graph, stress=length is not None), facts


def _potential(task):
    from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
    from equimd.models.transformer import TransformerPotential, TransformerSettings

    settings, isolated = dict(task["model"]), {1: 0.0, 8: 0.0}
    if settings.pop("family") == "equivariant":
        return EquivariantPotential(EquivariantSettings(**settings), (1, 8), isolated)
    return TransformerPotential(TransformerSettings(**settings), (1, 8), isolated)


def _ase_call(potential, task, numbers, positions, length):
    from ase import Atoms

    from equimd import EquimdCalculator

    atoms = Atoms(numbers, positions, cell=[length] * 3 if length else None, pbc=length is not None)
    atoms.calc = EquimdCalculator(potential, device=str(device_of(task)))
    moves = iter(np.random.default_rng(0).normal(scale=0.003, size=(20_000, *positions.shape)))

    def call():
        atoms.positions = positions + next(moves)
        atoms.get_forces()

    return call


def _training_step(potential, task, numbers, positions):
    """Energy and forces of a batch of equal molecules, the loss, its gradient, one step of Adam."""
    from equimd.graph import batch_graphs, graph_from_arrays

    cell, pbc = np.zeros((3, 3)), np.zeros(3, dtype=bool)
    graphs = [graph_from_arrays(positions, numbers, cell, pbc, potential.cutoff) for _ in range(task["batch"])]
    batch = batch_graphs(graphs).to(device_of(task))
    optimizer = torch.optim.Adam(potential.parameters(), lr=1e-5)

    def call():
        optimizer.zero_grad()
        prediction = potential.predict_trainable(batch)
        ((prediction.energy / len(numbers)).square().mean() + prediction.forces.square().mean()).backward()
        optimizer.step()

    return call


serve(setup)
