"""The load-time guards pass what is right and name what is wrong."""

import warnings

import numpy as np
import pytest
import torch
import toys

from equimd import neighbors
from equimd.errors import KernelWarning
from equimd.models import selfcheck
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.selfcheck import SelfCheckError, brute_force_neighbors, self_check
from equimd.models.transformer import TransformerPotential, TransformerSettings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zbl", [False, True])
@pytest.mark.parametrize("anisotropy", [0.0, 0.3])
def test_sound_potential_passes(anisotropy, zbl, dtype):
    report = self_check(toys.ToyPotential(anisotropy=anisotropy, zbl=zbl).to(dtype))
    assert report.ok, report.messages
    assert report.messages == ()
    # The tolerances are far from what a sound potential shows, in either direction of the sign.
    assert report.deviations["gradient"] < 1e-6
    assert report.deviations["stress"] < 1e-6
    assert report.deviations["precision"] < 1e-5
    report.raise_if_failed()


@pytest.mark.parametrize("species", [(1,), (79,), (1, 55), (6, 7, 8, 9, 15, 16, 17, 35)])
@pytest.mark.parametrize("cutoff", [1.0, 3.0, 8.0])
def test_every_mixture_of_elements_can_be_checked(species, cutoff):
    assert self_check(toys.ToyPotential(species=species, cutoff=cutoff)).ok


@pytest.mark.parametrize(
    "potential",
    [
        EquivariantPotential(EquivariantSettings(n_channels=8, avg_num_neighbors=20.0), (1, 8), toys.ISOLATED),
        TransformerPotential(TransformerSettings(d_model=16), (1, 8), toys.ISOLATED),
        TransformerPotential(TransformerSettings(d_model=16, direct_forces=True), (1, 8), toys.ISOLATED),
    ],
    ids=["equivariant", "transformer", "direct"],
)
def test_networks_pass_and_stay_as_they_are(potential):
    before = {name: tensor.clone() for name, tensor in potential.state_dict().items()}
    assert self_check(potential).ok
    assert potential.dtype == torch.float32
    assert all(p.requires_grad for p in potential.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in potential.state_dict().items())


def test_direct_forces_are_not_asked_for_a_gradient():
    report = self_check(toys.DirectForces())
    assert report.ok
    assert "gradient" not in report.deviations
    assert "stress" in report.deviations


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (toys.WrongForces, "not the gradient"),
        (toys.WrongStress, "stress is not"),
        (toys.HardCutoff, "beyond the cutoff"),
        (toys.BrokenSingle, "predictions in float32"),
        (toys.OrderDependent, "another order"),
        (toys.NotInvariant, "do not turn"),
    ],
)
def test_every_guard_catches_its_fault(broken, says):
    report = self_check(broken())
    assert not report.ok
    assert says in " ".join(report.messages)
    with pytest.raises(SelfCheckError, match=says) as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)


def test_chirality_is_caught_by_the_reflection_alone():
    class Chiral(toys.ToyPotential):
        def network(self, graph, vectors):
            # Σ over triples of neighbours of det[r_a, r_b, r_c]: a pseudo-scalar, invariant under proper rotations.
            i = graph.edge_index[0]
            smooth = self.pair(vectors).unsqueeze(1) * vectors
            moments = [
                vectors.new_zeros(graph.n_atoms, 3).index_add(0, i, smooth * vectors.square().sum(1, True) ** k)
                for k in range(3)
            ]
            return super().network(graph, vectors) + torch.linalg.det(torch.stack(moments, dim=1))

    report = self_check(Chiral(anisotropy=0.0))
    assert report.deviations["rotation"] < 1e-10
    assert [m for m in report.messages if "reflection" in m] == list(report.messages) != []


def _equivariant(l_max=2, rms_norm=False):
    settings = EquivariantSettings(n_channels=8, l_max=l_max, n_layers=2, avg_num_neighbors=20.0, rms_norm=rms_norm)
    return EquivariantPotential(settings, (1, 8), toys.ISOLATED)


def _transformer():
    settings = TransformerSettings(d_model=16, n_heads=2, d_feedforward=24)
    return TransformerPotential(settings, (1, 8), toys.ISOLATED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_broken_convolution_falls_back_to_the_reference(monkeypatch, dtype):
    """A backend that is wrong in one product, in either precision."""
    from equimd.kernels import llvm_cpu

    right = llvm_cpu.convolve_llvm

    def wrong(x, sh, radial, plan, topology):
        out = right(x, sh, radial, plan, topology)
        return torch.cat([out[:, :-1], -out[:, -1:]], dim=1)

    potential = _equivariant().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say of sound kernels
        assert self_check(potential).ok
    assert potential.kernel_backend == "auto"
    monkeypatch.setattr(llvm_cpu, "convolve_llvm", wrong)
    with pytest.warns(RuntimeWarning, match='"reference" is used instead'):
        assert self_check(potential).ok
    assert potential.kernel_backend == "reference"


FAULTS = {
    "forces that are not the gradient": ("gradient_source", "along += g_r[e]", "along += 0.7 * g_r[e]"),
    "a repulsion of another slope": ("geometry_source", "slope[e] = 0.5", "slope[e] = 5.0"),
    "a repulsion that is not in the energy": ("geometry_source", "repulsion[n] = total", "repulsion[n] = 0.0"),
    "energies that are not numbers": ("geometry_source", "repulsion[n] = total", "repulsion[n] = 0.0 / 0.0"),
    "a virial that is too large": ("scatter_source", "w[3 * a + b] += v[a]", "w[3 * a + b] += 2.0 * v[a]"),
    "one cell for all structures": ("geometry_source", "cell[batch[n]]", "cell[0]"),
    "edges beyond the cutoff": ("geometry_source", "if r > scales[0]:", "if r > 2 * scales[0]:"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_networks_fall_back(monkeypatch, fault):
    """At l_max 3, one line of the generated code wrong."""
    from equimd.kernels import geometry_codegen

    potential = _equivariant(l_max=3).requires_grad_(False)
    assert potential.has_frozen_network
    name, line, other = FAULTS[fault]
    right = getattr(geometry_codegen, name)
    with monkeypatch.context() as broken:

        def wrong(*args):
            source = right(*args)
            assert line in source.text
            return source._replace(text=source.text.replace(line, other))

        broken.setattr(geometry_codegen, name, wrong)
        potential._fused = None
        with pytest.warns(RuntimeWarning, match='"auto": off by .* "llvm" is used instead'):
            assert self_check(potential).ok
    assert not potential.has_frozen_network
    sound = _equivariant(l_max=3).requires_grad_(False)
    sound.load_state_dict(potential.state_dict())
    assert self_check(sound).ok
    assert sound.has_frozen_network


@pytest.mark.parametrize("kernel", ["attention_back", "swiglu_back", "tokens_back"])
def test_broken_transformer_networks_fall_back(monkeypatch, kernel):
    from equimd.kernels import token_run

    potential = _transformer().requires_grad_(False)
    run = token_run.Run.kernel
    monkeypatch.setattr(
        token_run.Run, "kernel", lambda self, name, *a, **k: None if name == kernel else run(self, name, *a, **k)
    )
    with pytest.warns(RuntimeWarning, match='"auto": off by .* "llvm" is used instead'):
        assert self_check(potential).ok
    assert not potential.has_frozen_network


@pytest.mark.parametrize("broken", [False, True])
def test_wrong_gradients_fall_back(monkeypatch, broken):
    """Training with a kernel whose gradient is another's; a sound one gives no warning."""
    from equimd.kernels import dual

    potential, call = _equivariant(), dual._Pass._call

    def wrong(self, name, low, high, arrays, **chunks):
        call(self, name, low, high, arrays, **chunks)
        if name == "grad_w":
            chunks["g_w"].rows.mul_(0.5)

    if not broken:
        selfcheck.check_training_kernels(potential)
        assert potential.kernel_backend == "auto"
        return
    monkeypatch.setattr(dual._Pass, "_call", wrong)
    with pytest.warns(RuntimeWarning, match='"auto": gradients are off by .* "llvm" is used instead'):
        selfcheck.check_training_kernels(potential)
    assert potential.kernel_backend == "llvm"


def test_gradients_by_autograd_through_kernels_are_checked(monkeypatch):
    """rms_norm networks train by second derivatives of the compiled convolution, as all do on a GPU."""
    from equimd.kernels import llvm_cpu

    potential = _equivariant(rms_norm=True).requires_grad_()
    assert not potential.trains_by_kernels
    run = llvm_cpu._run

    def wrong(kind, x, y, w, g, out, out2, *rest):
        run(kind, x, y, w, g, out, out2, *rest)
        if kind == "grad_w":
            out.mul_(0.5)

    selfcheck.check_training_kernels(potential)
    assert potential.kernel_backend == "auto"
    monkeypatch.setattr(llvm_cpu, "_run", wrong)
    with pytest.warns(KernelWarning, match='"auto": gradients are off by .* "reference" is used instead'):
        selfcheck.check_training_kernels(potential)
    assert potential.kernel_backend == "reference"


@pytest.mark.parametrize("kernel", ["", "attention_rates_back", "tokens_rates"])
def test_wrong_gradients_of_transformers_fall_back(monkeypatch, kernel):
    from equimd.kernels import token_run

    potential, run = _transformer().requires_grad_(), token_run.Run.kernel
    if not kernel:
        selfcheck.check_training_kernels(potential)
        assert potential.trains_by_kernels
        return
    monkeypatch.setattr(
        token_run.Run, "kernel", lambda self, name, *a, **k: None if name == kernel else run(self, name, *a, **k)
    )
    with pytest.warns(RuntimeWarning, match='"auto": gradients are off by .* "llvm" is used instead'):
        selfcheck.check_training_kernels(potential)
    assert not potential.trains_by_kernels


def test_compiler_that_fails_falls_back(monkeypatch):
    from equimd.kernels import network

    def fail(*_):
        raise OSError("no space left on device")

    potential = _equivariant().requires_grad_(False)
    monkeypatch.setattr(network, "compile_kernel", fail)
    with pytest.warns(RuntimeWarning, match="no space left on device"):
        assert self_check(potential).ok
    assert potential.kernel_backend == "llvm"


def test_wrong_weights_are_not_blamed_on_kernels():
    potential = _equivariant()
    with torch.no_grad():
        next(potential.parameters()).fill_(float("nan"))
    assert not self_check(potential).ok
    assert potential.kernel_backend == "auto"


def test_nan_weights_fail():
    potential = toys.ToyPotential()
    potential.scale.fill_(float("nan"))
    assert not self_check(potential).ok


@pytest.mark.parametrize("fault", ["missing", "invented", "wrong shift", "handedness"])
def test_broken_neighbour_list_is_caught(monkeypatch, fault):
    right = neighbors.neighbor_list

    def wrong(positions, cell, pbc, cutoff):
        edges, shifts = right(positions, cell, pbc, cutoff)
        if fault == "missing":
            return edges[:, 2:], shifts[2:]
        if fault == "invented":
            return np.concatenate([edges, edges[:, ::-1][:, :1]], axis=1), np.concatenate([shifts, shifts[:1] + 5])
        if fault == "handedness" and np.linalg.det(cell) > 0:
            return edges, shifts
        return edges, -shifts

    monkeypatch.setattr(neighbors, "neighbor_list", wrong)
    report = self_check(toys.ToyPotential())
    assert any("neighbour list" in message for message in report.messages)


def test_brute_force_counts_a_simple_cubic_lattice():
    edges = brute_force_neighbors(np.zeros((1, 3)), 2.0 * np.eye(3), np.ones(3, dtype=bool), 2.9)
    assert len(edges) == 6 + 12
    edges = brute_force_neighbors(np.zeros((1, 3)), 2.0 * np.eye(3), np.array([True, True, False]), 2.9)
    assert len(edges) == 4 + 4


def test_no_global_state_is_left_behind():
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state())
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    self_check(toys.ToyPotential())
    after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state())
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_small_structure_is_small_but_crowded():
    """Enough images to try the list, few enough edges for the second that the check may take."""
    structure = selfcheck._small_structure((1, 6, 8), 5.0)
    assert 60 < structure.graph(5.0).n_edges < 400
