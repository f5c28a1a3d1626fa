"""Denoising and direct-force pre-training: what is drawn, what is asked for, and that a resume asks for the same."""

import csv

import numpy as np
import pytest
import torch
from ase.io import read, write
from safetensors.torch import load_file
from test_loop import Killed, assert_same_run
from training_samples import TINY

from equimd import kernels
from equimd.errors import InputError
from equimd.graph import edge_vectors, select_systems
from equimd.models.checkpoint import load_checkpoint
from equimd.training import train
from equimd.training.denoising import chosen_structures, corrupt
from equimd.training.loss import active_weights, loss_terms
from equimd.training.objective import Objective
from equimd.training.recipe import make_recipe
from equimd.training.sections import DenoisingSection
from equimd.training.setup import prepare

MODELS = {
    "transformer": TINY["transformer"],
    "repelling": TINY["transformer"] | {"zbl": True},
    "equivariant": TINY["equivariant"] | {"n_layers": 3},
}
BOTH = {"denoising": {"probability": 0.4, "sigma": 0.1}, "pretraining": {"fraction": 0.5, "warmup": 0.1}}
FRAMES = np.arange(8)


def rows(run):
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def make(folder, values):
    """An objective, what it was made with, and a batch of the training set's first eight frames."""

    def build(family="transformer", **changes):
        recipe = make_recipe({**values, "model": MODELS[family], **changes}, folder)
        setup = prepare(recipe, torch.device("cpu"))
        return Objective(recipe, setup.potential), setup, setup.train.batch(torch.from_numpy(FRAMES))

    return build


def loss_of(objective, graph, frames, epoch, step, fraction):
    """Of a whole batch."""
    return objective.loss(objective.tasks(graph, frames, epoch, step), fraction, torch.ones(5))


def generators(n, first=0):
    return [np.random.default_rng(first + k) for k in range(n)]


def test_without_sections_it_is_prediction_and_loss(make):
    objective, setup, graph = make(loss={"energy": 3.0})
    terms = loss_of(objective, graph, FRAMES, 0, 0, 0.2)
    recipe = objective.recipe
    prediction = setup.potential.predict_trainable(graph)
    assert torch.equal(terms.total, loss_terms(prediction, graph, active_weights(recipe.loss, 0.2), recipe.loss).total)
    assert objective.modules == {}
    assert objective.parameters == objective.make_optimizers() == []


def test_what_is_denoised_depends_on_the_frame_only():
    section = DenoisingSection(probability=0.3, per="frame")
    every = np.arange(4000)
    chosen = chosen_structures(section, every, 1, seed=5, epoch=2, step=0)
    assert abs(len(chosen) / 4000 - 0.3) < 0.03  # four standard deviations
    part = every[1000:1100][::-1]  # the share of another process, in another order
    again = chosen_structures(section, part, 1, seed=5, epoch=2, step=77)
    assert {int(part[k]) for k in again} == {k for k in chosen if 1000 <= k < 1100}
    noise = {int(part[k]): generator.standard_normal() for k, generator in again.items()}
    assert noise == {k: chosen[k].standard_normal() for k in noise}
    for other in ({"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}):
        assert chosen_structures(section, every, 1, step=0, **other).keys() != chosen.keys()
    copies = chosen_structures(section, every, 2, seed=5, epoch=2, step=0)
    assert {k // 2 for k in copies if k % 2 == 0} == set(chosen)  # the first copy is the frame
    assert {k // 2 for k in copies if k % 2 == 1} != set(chosen)


def test_whole_batches_are_denoised_step_by_step():
    section = DenoisingSection(probability=0.3, per="batch")
    sizes = [len(chosen_structures(section, FRAMES, 2, 5, 2, step)) for step in range(2000)]
    assert set(sizes) == {0, 16}
    assert abs(np.mean(sizes) / 16 - 0.3) < 0.04
    one, other = (chosen_structures(section, frames, 1, 5, 2, sizes.index(16)) for frames in (FRAMES, FRAMES[4:]))
    assert one[4].standard_normal() == other[0].standard_normal()  # noise is the frame's, whatever the batch


def test_noise_is_what_is_said(make):
    _, _, graph = make()
    whole = corrupt(graph, DenoisingSection(sigma=0.2), generators(8))
    moved = (whole.graph.positions - graph.positions) / 0.2
    torch.testing.assert_close(moved, whole.noise)
    assert bool(whole.moved.all())
    assert 0.7 < float(whole.noise.square().mean()) < 1.1  # of which one part in N is taken out
    mean = torch.zeros(8, 3, dtype=torch.float64).index_add(0, graph.batch, whole.noise)
    assert float(mean.abs().max()) < 1e-12
    assert whole.graph.edge_index is graph.edge_index
    partly = corrupt(graph, DenoisingSection(atoms=0.4), generators(8))
    assert torch.equal(partly.moved, partly.noise.abs().sum(1) > 0)
    assert torch.bincount(graph.batch[partly.moved]).tolist() == [1, 2, 2] * 2 + [1, 2]  # of 3, 5 and 6 atoms
    alone = corrupt(select_systems(graph, torch.tensor([3])), DenoisingSection(atoms=0.4), generators(1, first=3))
    assert torch.equal(alone.noise, partly.noise[graph.batch == 3])


def test_a_batch_is_shared_between_both_tasks(make):
    section = {"per": "frame", "probability": 0.5, "energy": 0.5, "weight": 2.0}
    objective, setup, graph = make(denoising=section, loss={"kind": "mse"})
    recipe = objective.recipe
    usual, corrupted = objective.tasks(graph, FRAMES, 1, 0)
    assert corrupted is not None
    assert 0 < usual.n_systems < 8
    assert usual.n_systems + corrupted.graph.n_systems == 8
    terms = loss_of(objective, graph, FRAMES, 1, 0, 0.25)
    plain = loss_terms(setup.potential.predict_trainable(usual), usual, recipe.loss, recipe.loss)
    assert torch.equal(terms.forces, plain.forces)
    assert torch.equal(terms.energy, plain.energy)
    # What is told and asked for, once more by hand.
    assert objective.auxiliary is not None
    clean, rms = corrupted.clean, setup.potential.scale[0]
    vectors = edge_vectors(corrupted.graph, torch.float64)
    output, read = setup.potential.network_and_vectors(
        corrupted.graph, vectors, objective.auxiliary, clean.forces / rms
    )
    noise = (read[:, 0] - corrupted.noise).square().mean()
    energy = setup.potential.energies_of(clean, edge_vectors(clean, torch.float64), output)[0] - clean.energy
    energy = (energy / torch.bincount(clean.batch)).square().mean()
    expected = plain.total + 2.0 * 0.75 * noise + 0.5 * energy
    assert float(terms.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(terms.noise) == pytest.approx(float(noise.detach()), rel=1e-12)


def test_repulsion_is_that_of_the_clean_structure(make, monkeypatch):
    objective, setup, graph = make("repelling", denoising={"energy": 1.0})
    assert objective.recipe.denoising is not None
    corrupted = corrupt(graph, objective.recipe.denoising, generators(8))
    plain = torch.zeros(graph.n_atoms, dtype=torch.float64)
    nothing = torch.zeros(graph.n_atoms, 1, 3, dtype=torch.float64)
    monkeypatch.setattr(setup.potential, "network_and_vectors", lambda *arguments: (plain, nothing))
    error = objective._denoise(corrupted, 0.0, objective.recipe.loss, torch.ones(5)).energy_error * torch.bincount(
        graph.batch
    )
    of_clean, of_noisy = (
        setup.potential.energies_of(g, edge_vectors(g, torch.float64), plain)[0] - graph.energy
        for g in (graph, corrupted.graph)
    )
    assert torch.equal(error, of_clean)
    assert float((of_clean - of_noisy).abs().max()) > 0.1


def test_a_missing_force_is_not_told(make):
    objective, _, graph = make(denoising={"per": "frame", "probability": 0.99})
    graph.forces[graph.batch == 2] = float("nan")
    usual, corrupted = objective.tasks(graph, FRAMES, 0, 0)
    assert corrupted is not None
    assert not bool(torch.isnan(corrupted.clean.forces).any())
    assert bool(torch.isnan(usual.forces).any())
    graph.energy[:] = float("nan")
    assert bool(torch.isfinite(loss_of(objective, graph, FRAMES, 0, 0, 0.0).total))


def test_a_batch_that_is_denoised_whole(make):
    objective, setup, graph = make(denoising={"probability": 0.5}, optimizer={"lr": 1e-3})
    steps = [objective.tasks(graph, FRAMES, 0, step).usual.n_systems == 0 for step in range(8)]
    assert any(steps)
    assert not all(steps)
    terms = loss_of(objective, graph, FRAMES, 0, steps.index(True), 0.0)
    assert float(terms.forces) == float(terms.energy) == 0.0
    assert float(terms.noise) > 0
    terms.total.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in objective.parameters)
    for module in (setup.potential, objective.auxiliary):
        module.zero_grad()
    loss_of(objective, graph, FRAMES, 0, steps.index(False), 0.0).total.backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in objective.parameters)


def test_pretraining_reads_forces_then_differentiates(make, monkeypatch):
    objective, setup, graph = make(pretraining={"fraction": 0.3, "warmup": 0.1}, loss={"energy": 0.0})
    assert objective.auxiliary is not None
    _, read = setup.potential.network_and_vectors(graph, edge_vectors(graph, torch.float64), objective.auxiliary)
    direct = (read[:, 0] * setup.potential.scale[0] - graph.forces).square().mean()
    calls = []
    conservative = type(setup.potential).predict_trainable
    monkeypatch.setattr(
        type(setup.potential), "predict_trainable", lambda *a, **k: calls.append(1) or conservative(*a, **k)
    )
    assert float(loss_of(objective, graph, FRAMES, 0, 0, 0.29).forces) == pytest.approx(
        float(direct.detach()), rel=1e-12
    )
    assert not calls
    later = loss_of(objective, graph, FRAMES, 0, 0, 0.3)
    assert calls
    assert float(later.forces) != pytest.approx(float(direct.detach()), rel=1e-3)
    later.total.backward()
    assert all(p.grad is None for p in objective.parameters)
    factors = [objective.learning_rate_factor(x) for x in (0.0, 0.29, 0.3, 0.35, 0.4, 1.0)]
    assert factors == pytest.approx([1.0, 1.0, 0.0, 0.5, 1.0, 1.0])


def descent(objective, potential, graph, term, steps):
    """Means of a term of the loss over the first and the last ten steps on one batch."""
    optimizer = torch.optim.Adam([*potential.parameters(), *objective.parameters], 2e-2)
    values = []
    with kernels.using("reference"):  # no kernels are compiled for this network
        for epoch in range(steps):  # each with noise of its own
            terms = loss_of(objective, graph, FRAMES, epoch, epoch, 0.0)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            values.append(float(getattr(terms, term)))
    return np.mean(values[:10]), np.mean(values[-10:])


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_noise_is_found(make, family):
    section = {"probability": 0.98, "per": "frame", "sigma": 0.2, "weight": 1.0}
    objective, setup, graph = make(family, denoising=section, loss={"energy": 0.0, "forces": 0.0})
    before, after = descent(objective, setup.potential, graph, "noise", 100)
    assert after < 0.8 * before


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_forces_are_read(make, family):
    objective, setup, graph = make(family, pretraining={})
    before, after = descent(objective, setup.potential, graph, "forces", 50)
    assert after < 0.5 * before


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_training_goes_on_with_gradients_and_leaves_no_head(folder, values, family):
    values |= {
        "model": MODELS[family],
        "steps": 72,
        "optimizer": {"name": "adamw", "lr": 2e-2},
        "loss": {"kind": "mse"},
        "batch": {"n_frames": 8},
        **BOTH,
    }
    values |= {"ema": {"decay": 0.8}, "validation": {"symmetry_frames": 0}}
    with kernels.using("reference"):
        train(make_recipe(values, folder), folder / "run", progress=False)
    table = rows(folder / "run")
    assert 0 < len([row for row in table if row["train_noise_rmse"]]) < 24  # in some epochs nothing is denoised
    of_gradient = [float(row["valid_force_mae_meV_per_A"]) for row in table]  # 3 steps in an epoch
    assert np.mean(of_gradient[-3:]) < 0.95 * np.mean(of_gradient[10:13])
    potential, _ = load_checkpoint(folder / "run" / "model.safetensors", dtype="float64")
    recipe = make_recipe({**values, "denoising": None, "pretraining": None}, folder)
    plain = prepare(recipe, torch.device("cpu")).potential
    assert potential.state_dict().keys() == plain.state_dict().keys()
    for name in ("model", "last"):
        assert not any("told" in key or "auxiliary" in key for key in load_file(folder / "run" / f"{name}.safetensors"))
    assert any(key.startswith("auxiliary/") for key in load_file(folder / "run" / "state.safetensors"))


@pytest.mark.parametrize("per", ["frame", "batch"])
def test_resume_with_both_sections_is_bit_for_bit(folder, values, monkeypatch, per):
    from equimd.training import loop

    values |= {"steps": 12, "checkpoint": {"steps": 2, "minutes": None}, **BOTH}
    values["denoising"] = {**BOTH["denoising"], "per": per, "energy": 0.5}
    values |= {"augmentation": {"copies": 2}, "validation": {"symmetry_frames": 0}}
    values["optimizer"] = {"name": "muon", "weight_decay": 1e-2}
    recipe = make_recipe(values, folder)
    train(recipe, folder / "whole", progress=False)
    for calls in (5, 10):  # in the one phase and in the other
        count, original = 0, loop._Training.step

        def dies(self, *arguments, last=calls, original=original):
            nonlocal count
            count += 1
            if count == last:
                raise Killed
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop._Training, "step", dies)
            with pytest.raises(Killed):
                train(recipe, folder / f"killed{calls}", progress=False)
        train(recipe, folder / f"killed{calls}", resume=True, progress=False)
        assert_same_run(folder / f"killed{calls}", folder / "whole")
    values["denoising"] = {**values["denoising"], "sigma": 0.11}
    train(make_recipe(values, folder), folder / "other", progress=False)
    with pytest.raises(AssertionError):
        assert_same_run(folder / "other", folder / "whole")


def test_pretraining_is_not_stopped_early(folder, values):
    values |= {"steps": 24, "early_stopping": {"patience": 1}, "optimizer": {"lr": 1e-300}}
    values["validation"] = {"symmetry_frames": 0}
    values["pretraining"] = {"fraction": 0.5, "warmup": 0.0}  # 4 steps in an epoch
    result = train(make_recipe(values, folder), folder / "run", progress=False)
    assert result.stopped == "early stopping"
    assert result.steps == 12  # the weights do not move; without pre-training it would be 8


def test_the_length_decides_where_pretraining_ends(folder, values):
    values |= {"steps": 4, "schedule": {"kind": "constant"}, "pretraining": {}}
    train(make_recipe(values, folder), folder / "run", progress=False)
    with pytest.raises(InputError, match=r"recipe.steps was 4 and is now 8"):
        train(make_recipe({**values, "steps": 8}, folder), folder / "run", resume=True, progress=False)


def test_refusals(folder, values):
    equivariant = TINY["equivariant"]
    for change, said in (
        ({"denoising": {"sigm": 0.1}}, r"unknown key 'denoising.sigm'; did you mean 'sigma'\?"),
        ({"denoising": {"probability": 1.0}}, r"denoising.probability is 1.0: Input should be less than 1"),
        ({"denoising": {"sigma": 0.0}}, r"denoising.sigma is 0.0: Input should be greater than 0"),
        ({"denoising": {}, "model": equivariant}, r"denoising: model.n_layers is 2; at least 3 are accepted"),
        ({"pretraining": {}, "model": {**equivariant, "n_layers": 1}}, r"pretraining: model.n_layers is 1; at least 2"),
        ({"pretraining": {}, "model": {**equivariant, "l_max": 0}}, r"pretraining: model.l_max is 0; at least 1"),
        ({"pretraining": {"fraction": 1.0}}, r"pretraining.fraction is 1.0"),
        ({"pretraining": {}, "model": {**values["model"], "direct_forces": True}}, r"model.direct_forces is true"),
    ):
        with pytest.raises(InputError, match=said) as error:
            make_recipe({**values, **change}, folder)
        assert "\n" not in str(error.value)
    frames = read(folder / "train.xyz", ":")
    for atoms in frames:
        del atoms.calc.results["forces"]
    write(folder / "energies.xyz", frames, format="extxyz")
    values |= {"data": {**values["data"], "train": "energies.xyz"}, "loss": {"forces": 0.0}}
    for name in ("denoising", "pretraining"):
        with pytest.raises(InputError, match=rf"{name} needs forces but energies.xyz has no forces labels"):
            train(make_recipe({**values, name: {}}, folder), folder / "run", progress=False)
    assert not (folder / "run").exists()
