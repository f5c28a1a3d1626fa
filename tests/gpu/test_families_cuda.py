"""Both families on a GPU against the same weights on the CPU, and the check that calculators run when they load one."""

import warnings

import numpy as np
import pytest
import torch
import toys

from equimd import kernels
from equimd.graph import batch_graphs, graph_from_arrays
from equimd.models.checkpoint import build_potential, list_potentials, load_potential
from equimd.models.equivariant import EquivariantSettings
from equimd.models.selfcheck import self_check
from equimd.models.symmetrized import SymmetrizedPotential
from equimd.models.transformer import TransformerSettings

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS = {
    "equivariant": EquivariantSettings(n_layers=2, n_channels=8, cutoff=4.0, avg_num_neighbors=15.0),
    "both parities": EquivariantSettings(n_layers=2, n_channels=8, l_max=1, parity=True, rms_norm=True, cutoff=4.0),
    "transformer": TransformerSettings(d_model=16, n_heads=2, d_feedforward=16, d_atom_feedforward=24, cutoff=4.0),
    "direct forces": TransformerSettings(d_model=16, n_heads=2, d_feedforward=16, direct_forces=True, cutoff=4.0),
}
# Of the norm: rounding is some 1e-7 or 1e-16 a sum, and atomic energies nearly cancel. TF32 would leave 1e-3.
EQUAL = {torch.float32: 2e-5, torch.float64: 1e-10}
DTYPES = [torch.float32, torch.float64]


def make(name, device, dtype, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        potential = build_potential(SETTINGS[name], (1, 6, 8), toys.ISOLATED)
    return potential.to(device, dtype)


def graph_of(n_atoms=40, seed=0, cutoff=4.0):
    """Atoms on a jittered grid in a sheared cell."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:n_atoms]
    cell = 2.2 * side * np.array([[1.0, 0.0, 0.0], [0.1, 1.0, 0.0], [-0.2, 0.1, 1.0]])
    positions = (grid + 0.2 * rng.random((n_atoms, 3))) / side @ cell
    return graph_from_arrays(positions, rng.choice([1, 6, 8], n_atoms), cell, np.ones(3, dtype=bool), cutoff)


def difference(own, exact):
    """The largest of those of atomic energies, forces and stress, relative to their norms."""
    pairs = [(own.energies, exact.energies), (own.forces, exact.forces), (own.stress, exact.stress)]
    return max(float((a.detach().cpu().double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def reference(potential, graph):
    """On the CPU in float64."""
    with kernels.using("reference"):
        return potential(graph, stress=True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_cpu(name, dtype, frozen):
    graph = batch_graphs([graph_of(40), graph_of(7, seed=1)])
    potential = make(name, DEVICE, dtype).requires_grad_(not frozen)
    own = potential(graph.to(DEVICE), stress=True)
    exact = reference(make(name, "cpu", torch.float64), graph)
    assert own.energy.device.type == own.forces.device.type == own.stress.device.type == torch.device(DEVICE).type
    assert difference(own, exact) < EQUAL[dtype]
    assert torch.allclose(own.energy.cpu(), exact.energy, rtol=0, atol=20 * EQUAL[dtype] * len(graph.positions))


def test_other_weights_do_not_give_the_same():
    own = make("equivariant", DEVICE, torch.float32, seed=2)(graph_of().to(DEVICE), stress=True)
    assert difference(own, reference(make("equivariant", "cpu", torch.float64), graph_of())) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_of_a_force_loss_equal_the_cpu(name, dtype):
    gradients = []
    for device, precision in ((DEVICE, dtype), ("cpu", torch.float64)):
        potential = make(name, device, precision).train()
        with kernels.using("auto" if device == DEVICE else "reference"):
            prediction = potential(graph_of().to(device), create_graph=True)
            (prediction.forces.square().sum() + prediction.energies.square().sum()).backward()
        found = [p.grad for p in potential.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.detach().cpu().double().flatten() for g in found]))
    assert gradients[1].any()
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 10 * EQUAL[dtype]


def test_no_atoms_in_reach():
    graph = graph_from_arrays(
        np.array([[0.0, 0, 0], [50.0, 0, 0]]), np.array([1, 8]), np.zeros((3, 3)), np.zeros(3, dtype=bool), 4.0
    )
    assert graph.n_edges == 0
    for name in ("equivariant", "transformer"):
        assert not make(name, DEVICE, torch.float32)(graph.to(DEVICE)).forces.any()


@pytest.mark.parametrize("name", ["equivariant", "transformer"])
def test_average_over_rotations_equals_the_cpu(name):
    own, exact = (
        SymmetrizedPotential(make(name, device, torch.float64).requires_grad_(False), mode="average")
        for device in (DEVICE, "cpu")
    )
    assert difference(own(graph_of().to(DEVICE), stress=True), reference(exact, graph_of())) < EQUAL[torch.float64]


# --- the check on loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
def test_sound_potentials_pass_with_the_fastest_kernels(name, dtype):
    potential = make(name, DEVICE, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = self_check(potential)
    assert report.ok, report.messages
    assert potential.kernel_backend == "auto"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", list_potentials())
def test_shipped_potentials_pass(name, dtype):
    report = self_check(load_potential(name, device=DEVICE, dtype=dtype))
    assert report.ok, report.messages


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (toys.WrongForces, "not the gradient"),
        (toys.WrongStress, "stress is not"),
        (toys.HardCutoff, "beyond the cutoff"),
        (toys.BrokenSingle, "predictions in float32"),
        (toys.NotInvariant, "do not turn"),
    ],
)
def test_broken_potentials_do_not(broken, says):
    report = self_check(broken().to(DEVICE))
    assert not report.ok
    assert says in " ".join(report.messages)
