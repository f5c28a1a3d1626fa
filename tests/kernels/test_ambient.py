"""What torch keeps about the caller changes no prediction and no loaded potential, and is as it was afterwards."""

import contextlib

import numpy as np
import pytest
import torch
from ase import Atoms
from network_problems import make_graph, make_potential, make_transformer
from toys import ToyPotential

from equimd.calculators.ase import EquimdCalculator
from equimd.kernels import using
from equimd.models.checkpoint import load_checkpoint, save_checkpoint
from equimd.models.ensemble import EnsemblePotential
from equimd.models.selfcheck import self_check
from equimd.models.symmetrized import SymmetrizedPotential


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def flush_denormal():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "flush denormal": flush_denormal,
    "deterministic": deterministic,
}


def state():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def same(got, wanted):
    """To the last bit, in normal tensors that are not all zero."""
    for name in ("energy", "energies", "forces", "stress"):
        value = getattr(got, name)
        assert torch.equal(value, getattr(wanted, name)), name
        assert value.dtype == getattr(wanted, name).dtype
        assert not value.is_inference()
    assert got.forces.abs().max() > 1e-3


POTENTIALS = {
    "equivariant": lambda: make_potential(torch.float32),
    "transformer": lambda: make_transformer(torch.float32),
    "average": lambda: SymmetrizedPotential(make_transformer(torch.float32), "average", degree=3, inversion=False),
    "canonical": lambda: SymmetrizedPotential(make_transformer(torch.float32), "canonical"),
    "ensemble": lambda: EnsemblePotential([make_potential(torch.float32), make_potential(torch.float32)]),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", POTENTIALS)
def test_predictions_do_not_depend_on_it(kind, backend):
    graph = make_graph()
    with using(backend):
        wanted = POTENTIALS[kind]()(graph, stress=True)
        for ambient in AMBIENT.values():
            potential = POTENTIALS[kind]()  # what is compiled at the first call does not, either
            with ambient():
                before = state()
                same(potential(graph, stress=True), wanted)
                same(potential(make_graph(), stress=True), wanted)  # a graph that was made there
                assert state() == before


@pytest.mark.parametrize("kind", ["average", "canonical", "ensemble"])
@pytest.mark.parametrize("ambient", ["inference mode", "meta", "bfloat16"])
def test_wrappers_may_be_made_there(kind, ambient):
    inner, graph = make_transformer(torch.float32), make_graph()
    make = {
        "average": lambda: SymmetrizedPotential(inner, "average", degree=3, inversion=False),
        "canonical": lambda: SymmetrizedPotential(inner, "canonical"),
        "ensemble": lambda: EnsemblePotential([inner, inner]),
    }[kind]
    wanted = make()(graph, stress=True)
    with AMBIENT[ambient]():
        potential = make()
        same(potential(graph, stress=True), wanted)
    same(potential(graph, stress=True), wanted)


class Rounded(ToyPotential):
    """With a matrix product, which autocast rounds."""

    def network(self, graph, vectors):
        return (super().network(graph, vectors).unsqueeze(1) @ torch.eye(1)).squeeze(1)


def test_a_training_keeps_its_autocast_and_a_prediction_does_not():
    potential, graph = Rounded(), make_graph()
    wanted = potential(graph).energies
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(potential(graph).energies, wanted)
        assert (potential(graph, create_graph=True).energies - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("make", [make_potential, make_transformer])
def test_loading_does_not_depend_on_it(make, tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", make(torch.float32))
    wanted = load_checkpoint(tmp_path / "model.safetensors")[0].state_dict()
    for ambient in AMBIENT.values():
        with ambient():
            before = state()
            loaded, _ = load_checkpoint(tmp_path / "model.safetensors")
            assert state() == before
        assert loaded.isolated_atom_energies == make().isolated_atom_energies
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
            assert tensor.dtype == wanted[name].dtype
            assert not tensor.is_inference()


@pytest.mark.parametrize("ambient", AMBIENT)
def test_calculators_do_not_depend_on_it(ambient):
    atoms = Atoms("OH2", [[0, 0, 0], [0.8, 0.6, 0], [-0.7, 0.5, 0.3]], cell=np.diag([3.0, 3.5, 4.0]), pbc=True)
    wanted = EquimdCalculator(make_transformer(), device="cpu", self_check=False)
    energy, forces = wanted.get_potential_energy(atoms), wanted.get_forces(atoms)
    batch = wanted.evaluate([atoms, atoms]).forces[1]  # matrix products of other sizes round differently
    with AMBIENT[ambient]():
        # What a user makes in bfloat16 is rounded before it reaches us.
        potential = make_transformer() if ambient in ("inference mode", "no gradients") else wanted.potential
        calc = EquimdCalculator(potential, device="cpu", self_check=False)
        assert calc.get_potential_energy(atoms) == energy
        assert np.array_equal(calc.get_forces(atoms), forces)
        assert np.array_equal(calc.evaluate([atoms, atoms]).forces[1], batch)
        assert calc.evaluate_rotated(atoms, np.eye(3)[None]).energies[0] == pytest.approx(energy, abs=1e-4)
        assert self_check(calc.potential).ok
    atoms.positions[0] += 0.01
    assert np.array_equal(calc.get_forces(atoms), wanted.get_forces(atoms))  # and out of it again


def test_autograd_that_leads_nowhere_is_no_zero_force():
    """Negative twin: an energy without a gradient is refused where there are edges, and only there."""

    class Detached(ToyPotential):
        def network(self, graph, vectors):
            return super().network(graph, vectors).detach()

    with pytest.raises(RuntimeError, match="without autograd"):
        Detached()(make_graph(third=8))
    alone = Detached()(make_graph(n=1, length=20.0))
    assert not alone.forces.any()


@pytest.mark.parametrize("ambient", ["inference mode", "float16", "autocast"])
def test_another_precision_may_be_made_anywhere(ambient):
    """As the equivariance error does for its floor; weights copied in inference mode would have no gradient."""
    calculator = EquimdCalculator(ToyPotential(), self_check=False)
    atoms = Atoms("OH2", positions=[[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    wanted = calculator.with_dtype("float64").get_forces(atoms)
    with AMBIENT[ambient]():
        found = calculator.with_dtype("float64").get_forces(atoms)
    assert np.array_equal(found, wanted)
