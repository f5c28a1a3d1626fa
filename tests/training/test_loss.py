import csv
import math

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from toys import ISOLATED, ToyPotential
from training_samples import TINY, labelled_graph, spring_frames

from equimd.errors import InputError
from equimd.graph import AtomGraph, batch_graphs, graph_from_arrays
from equimd.models.checkpoint import build_potential
from equimd.models.equivariant import EquivariantSettings
from equimd.models.potential import Prediction
from equimd.models.transformer import TransformerSettings
from equimd.rotations import rotate_tensor, rotate_vectors
from equimd.training import train
from equimd.training.augment import epoch_rotations, rotate_graph
from equimd.training.data import build_frame_set
from equimd.training.distributed import World
from equimd.training.loss import active_weights, label_counts, loss_terms
from equimd.training.recipe import make_recipe
from equimd.training.sections import LastWeights, LossSection, LossWeights
from equimd.training.validation import evaluate


def test_terms_are_means_per_component():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    prediction = potential(graph, stress=True)
    graph.energy, graph.forces, graph.stress = graph.energy + 0.4, graph.forces + 0.2, graph.stress + 0.3
    section = LossSection(energy=2.0, forces=3.0, stress=5.0, kind="mse")
    terms = loss_terms(prediction, graph, section, section)
    assert float(terms.energy) == pytest.approx(0.1**2)  # 4 atoms in each structure
    assert float(terms.forces) == pytest.approx(0.2**2)
    assert float(terms.stress) == pytest.approx(0.3**2)
    assert float(terms.total) == pytest.approx(2 * 0.01 + 3 * 0.04 + 5 * 0.09)


def test_huber_is_square_then_linear():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    prediction = potential(graph)
    section = LossSection(energy=0.0, kind="huber", huber_delta=0.1)
    small, large = graph.forces + 0.05, graph.forces + 0.5
    graph.forces = small
    assert float(loss_terms(prediction, graph, section, section).total) == pytest.approx(0.05**2)
    graph.forces = large
    terms = loss_terms(prediction, graph, section, section)
    assert float(terms.total) == pytest.approx(0.1 * (1.0 - 0.1))
    assert float(terms.forces) == pytest.approx(0.5**2)  # what is reported is a mean square


def test_absolute_errors_are_lengths_that_no_rotation_changes():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    prediction = potential(graph, stress=True)
    graph.energy, graph.forces = graph.energy - 0.4, graph.forces + torch.tensor([0.3, 0.0, 0.4])
    graph.stress = graph.stress + 0.1 * torch.eye(3)
    section = LossSection(energy=2.0, forces=3.0, stress=5.0, kind="mae")
    total = float(loss_terms(prediction, graph, section, section).total)
    assert total == pytest.approx(2 * 0.1 + 3 * 0.5 + 5 * 0.1 * 3**0.5)
    rotations = torch.from_numpy(epoch_rotations(2, 1, 0, 0, True)[:, 0])
    rotated = rotate_graph(graph, rotations)
    turned = Prediction(
        prediction.energy,
        prediction.energies,
        rotate_vectors(prediction.forces.unsqueeze(1), rotations[graph.batch]).squeeze(1),
        rotate_tensor(prediction.stress, rotations),
    )
    assert float(loss_terms(turned, rotated, section, section).total) == pytest.approx(total)
    huber = LossSection(forces=3.0, kind="huber", huber_delta=0.1)
    values = [float(loss_terms(*pair, huber, huber).total) for pair in ((prediction, graph), (turned, rotated))]
    assert abs(values[0] - values[1]) > 1e-3  # components do change


@pytest.mark.parametrize(("per_atom", "divisor"), [(True, 4.0), ("sqrt", 2.0), (False, 1.0)])
def test_energies_are_divided_as_the_recipe_says(per_atom, divisor):
    potential = ToyPotential().double()
    graph = labelled_graph(potential)  # of 4 atoms each
    prediction = potential(graph)
    graph.energy = graph.energy + 0.4
    section = LossSection(forces=0.0, energy_per_atom=per_atom, kind="mse")
    terms = loss_terms(prediction, graph, section, section)
    assert float(terms.total) == pytest.approx((0.4 / divisor) ** 2)
    assert float(terms.energy) == pytest.approx(0.1**2)  # reported per atom


def test_missing_labels_give_no_gradient():
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    graph.forces = graph.forces.clone() + 1.0
    graph.forces[graph.batch == 0] = float("nan")
    graph.energy = torch.full_like(graph.energy, float("nan"))
    prediction = potential(graph)
    forces = prediction.forces.clone().requires_grad_()
    section = LossSection()
    terms = loss_terms(prediction._replace(forces=forces), graph, section, section)
    terms.total.backward()
    assert float(terms.energy) == 0.0
    assert float(terms.forces) == pytest.approx(1.0)
    assert forces.grad is not None
    assert torch.all(forces.grad[graph.batch == 0] == 0)
    assert torch.all(forces.grad[graph.batch == 1] != 0)


def test_weights_switch_in_the_last_part():
    section = LossSection(energy=1.0, forces=7.0, stress=3.0, last=LastWeights(energy=50.0, fraction=0.25))
    assert active_weights(section, 0.74) == LossWeights(energy=1.0, forces=7.0, stress=3.0)
    assert active_weights(section, 0.75) == LossWeights(energy=50.0, forces=7.0, stress=3.0)
    staged = LossSection(stages=[{"start": 0.5, "forces": 9.0}], last={"fraction": 0.25, "stress": 0.0, "energy": 2.0})
    assert active_weights(staged, 0.75) == LossWeights(energy=2.0, forces=9.0, stress=0.0)


def test_stages_jump_or_ramp_and_keep_what_they_do_not_name():
    stages = [{"start": 0.2, "energy": 10.0}, {"start": 0.6, "forces": 0.5, "stress": 2.0}]
    jumps = LossSection(energy=0.0, forces=1.0, stages=stages)
    found = [tuple(active_weights(jumps, t).model_dump().values()) for t in (0.0, 0.19, 0.2, 0.6, 1.0)]
    assert found == [(0.0, 1.0, 0.0), (0.0, 1.0, 0.0), (10.0, 1.0, 0.0), (10.0, 0.5, 2.0), (10.0, 0.5, 2.0)]
    ramps = LossSection(energy=0.0, forces=1.0, stages=stages, ramp=0.2)
    found = [active_weights(ramps, t).energy for t in (0.1, 0.2, 0.25, 0.4, 0.9)]
    assert found == pytest.approx([0.0, 0.0, 2.5, 10.0, 10.0])
    assert active_weights(ramps, 0.7).stress == pytest.approx(1.0)
    assert jumps.largest("stress") == 2.0
    assert jumps.largest("energy") == 10.0


def test_stages_out_of_order_are_refused(values):
    for section in (
        {"stages": [{"start": 0.5, "energy": 1.0}, {"start": 0.5, "energy": 2.0}]},
        {"stages": [{"start": 0.9, "energy": 1.0}], "last": {"fraction": 0.2}},
    ):
        with pytest.raises(InputError, match=r"loss: stages \(last included\) start at .* ascend"):
            make_recipe({**values, "loss": section})
    with pytest.raises(InputError, match=r"unknown key 'loss.stages.0.begin'; did you mean"):
        make_recipe({**values, "loss": {"stages": [{"begin": 0.5}]}})


def test_forces_first_then_energies_through_a_training(folder, values):
    values["loss"] = {"energy": 0.0, "stages": [{"start": 0.5, "energy": 10.0}]}  # 8 steps in 2 epochs
    train(make_recipe({**values, "steps": 8}, folder), folder / "run", progress=False)
    with open(folder / "run" / "metrics.csv", encoding="utf-8") as file:
        before, after = (row["train_energy_rmse_meV_per_atom"] for row in csv.DictReader(file))
    assert not before  # not part of the loss
    assert float(after) > 0.0


# --- labels that are missing ------------------------------------------------------------------------------------------


def small_potential(family):
    torch.manual_seed(0)
    settings = {"equivariant": EquivariantSettings, "transformer": TransformerSettings}[family](**TINY[family])
    return build_potential(settings, (1, 6, 8), ISOLATED).double()


def gradients(potential, graph, section):
    potential.zero_grad()
    prediction = potential.predict_trainable(graph, stress=True)
    loss_terms(prediction, graph, section, section).total.backward()
    return {n: p.grad.clone() for n, p in potential.named_parameters() if p.grad is not None}, prediction


def loss_of_what_is_known(prediction, graph, section):
    """The loss, written down for known labels only: nothing that is NaN takes part."""

    def mean(predicted, label):
        pairs = zip(predicted.flatten(), label.flatten(), strict=True)
        error = torch.stack([p - q for p, q in pairs if not torch.isnan(q)])
        delta = section.huber_delta
        if section.kind == "huber":
            return torch.where(error.abs() <= delta, error**2, delta * (2 * error.abs() - delta)).mean()
        return error.square().mean()

    n = torch.bincount(graph.batch)
    return (
        section.energy * mean(prediction.energy / n, graph.energy / n)
        + section.forces * mean(prediction.forces, graph.forces)
        + section.stress * mean(prediction.stress, graph.stress)
    )


@pytest.mark.parametrize("family", ["equivariant", "transformer"])
@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_gradients_are_those_without_the_missing_components(family, kind):
    potential = small_potential(family)
    graph = labelled_graph(potential)
    graph.energy[0] = float("nan")
    graph.forces[5:7] = float("nan")
    graph.stress[0, :2, 1] = float("nan")
    with torch.no_grad():
        for p in potential.parameters():
            p.add_(0.1)  # so that there are errors
    section = LossSection(energy=2.0, forces=3.0, stress=50.0, kind=kind)
    found, _ = gradients(potential, graph, section)
    potential.zero_grad()
    loss_of_what_is_known(potential.predict_trainable(graph, stress=True), graph, section).backward()
    for name, p in potential.named_parameters():
        if p.grad is not None:
            assert torch.isfinite(found[name]).all()
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)
    # The trap: NaN times zero is NaN, so a loss that multiplies with a mask has no finite gradient.
    potential.zero_grad()
    prediction = potential.predict_trainable(graph, stress=True)
    ((prediction.stress - graph.stress) * ~torch.isnan(graph.stress)).square().mean().backward()
    assert any(p.grad is not None and not torch.isfinite(p.grad).all() for p in potential.parameters())


@pytest.mark.parametrize("kind", ["mse", "huber", "mae"])
@pytest.mark.parametrize("family", ["equivariant", "transformer"])
def test_structures_without_volume_or_label_teach_no_stress(family, kind):
    potential = small_potential(family)
    positions = np.array([[0.1, 0, 0], [1.2, 0.1, 0], [0, 1.9, 1.0]])
    molecule, crystal = (
        graph_from_arrays(positions, np.array([1, 6, 8]), cell, np.full(3, periodic), potential.cutoff)
        for cell, periodic in ((np.zeros((3, 3)), False), (3.5 * np.eye(3), True))
    )
    crystal.stress = torch.full((1, 3, 3), 0.1, dtype=torch.float64)
    crystal.stress[0, 0, 1] = float("nan")
    section = LossSection(energy=0.0, forces=0.0, stress=1.0, kind=kind)
    wanted, _ = gradients(potential, batch_graphs([crystal]), section)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6
    for label in (0.3, float("nan")):  # one that nothing can meet, and none
        molecule.stress = torch.full((1, 3, 3), label, dtype=torch.float64)
        found, prediction = gradients(potential, batch_graphs([molecule, crystal]), section)
        assert torch.isnan(prediction.stress[0]).all()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


def test_a_stress_known_in_part_is_learned_from_rotated_frames():
    potential = ToyPotential(anisotropy=0.0).double()
    graph = labelled_graph(potential)
    graph.stress = graph.stress + 0.3
    section = LossSection(energy=0.0, forces=0.0, stress=1.0, kind="mse")
    rotations = torch.from_numpy(epoch_rotations(2, 1, 0, 0, True)[:, 0])

    def total(rotated):
        return float(loss_terms(potential(rotated, stress=True), rotated, section, section).total)

    assert total(rotate_graph(graph, rotations)) == pytest.approx(0.3**2)
    graph.stress[0, 2] = graph.stress[0, :, 2] = float("nan")  # as of a slab
    rotated = rotate_graph(graph, rotations)
    assert torch.isnan(rotated.stress[0]).all()  # no component of the rotated tensor is known
    assert total(rotated) == pytest.approx(0.3**2)
    graph.stress[0, 0, 0] += 1.0
    assert total(rotate_graph(graph, rotations)) == pytest.approx((12 * 0.3**2 + 1.3**2) / 13)


@pytest.mark.parametrize("kind", ["mse", "huber", "mae"])
def test_losses_of_parts_add_up_by_their_counts(kind):
    potential = ToyPotential().double()
    graph = labelled_graph(potential)
    graph.energy, graph.forces, graph.stress = graph.energy + 0.4, graph.forces + 0.2, graph.stress + 0.3
    graph.energy[1] = graph.forces[1] = graph.forces[2, 0] = graph.stress[0, 1] = float("nan")
    prediction = potential(graph, stress=True)
    whole, parts = label_counts(graph, LossSection(kind=kind)), []
    for s in range(2):
        atoms = graph.batch == s
        part = AtomGraph(batch=torch.zeros(4, dtype=torch.int64), forces=graph.forces[atoms])
        part.cell, part.energy, part.stress = graph.cell[s : s + 1], graph.energy[s : s + 1], graph.stress[s : s + 1]
        part.n_systems = 1
        own = Prediction(prediction.energy[s : s + 1], None, prediction.forces[atoms], prediction.stress[s : s + 1])
        parts.append((own, part, label_counts(part, LossSection(kind=kind)) / whole))
    for term in range(3):
        section = LossSection(**dict(zip(("energy", "forces", "stress"), np.eye(3)[term], strict=True)), kind=kind)
        totals = [float(loss_terms(own, part, section, section).total) for own, part, _ in parts]
        wanted = float(loss_terms(prediction, graph, section, section).total)
        assert wanted > 1e-3
        assert sum(t * float(share[term]) for t, (_, _, share) in zip(totals, parts, strict=True)) == pytest.approx(
            wanted
        )


def test_missing_labels_through_a_training(folder, values):
    frames = read(folder / "train.xyz", ":")
    for k, atoms in enumerate(frames):
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, **({"energy": energy} if k % 2 else {"forces": forces}))
    write(folder / "train.xyz", frames, format="extxyz")
    result = train(make_recipe(values, folder), folder / "run", progress=False)
    assert result.valid.force_mae is not None
    assert math.isfinite(result.valid.force_mae)
    with open(folder / "run" / "metrics.csv", encoding="utf-8") as file:
        assert all(math.isfinite(float(row["train_loss"])) for row in csv.DictReader(file))


def test_errors_are_of_what_has_labels(folder):
    potential = ToyPotential(anisotropy=0.0).double()
    held = build_frame_set(spring_frames(4, 0), potential.cutoff, {1: -13.6, 6: -1030.0, 8: -2040.0}, "x")
    whole = evaluate(potential, held, False, World(), 12_000)
    held.forces[:3] = float("nan")  # of the first structure
    held.energy[1] = float("nan")
    fewer = evaluate(potential, held, False, World(), 12_000)
    assert fewer.force_mae != whole.force_mae
    assert fewer.energy_mae != whole.energy_mae
    potential.shift[:] = float("nan")
    assert math.isnan(
        evaluate(potential, held, False, World(), 12_000).metric("energy_mae")
    )  # a prediction is, which no mask hides
    held.energy[:] = float("nan")
    assert evaluate(potential, held, False, World(), 12_000).energy_mae is None


def test_a_metric_without_labels_is_refused(folder, values):
    frames = read(folder / "valid.xyz", ":")
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy())
    write(folder / "valid.xyz", frames, format="extxyz")
    with pytest.raises(InputError, match=r"validation.metric is 'force_mae' but valid.xyz has no such labels"):
        train(make_recipe(values, folder), folder / "run", progress=False)
    values["validation"] |= {"metric": "energy_mae"}
    assert train(make_recipe(values, folder), folder / "run", progress=False).valid.force_mae is None


def test_a_batch_without_a_label_that_counts_changes_nothing(folder, values):
    frames = read(folder / "train.xyz", ":")
    for atoms in frames[1:]:
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy())
    write(folder / "train.xyz", frames, format="extxyz")
    values |= {"loss": {"energy": 0.0}, "batch": {"n_frames": 1}, "steps": 24, "augmentation": {"rotate": False}}
    values["validation"]["symmetry_frames"] = 0
    for name in ("adamw", "muon"):
        recipe = make_recipe({**values, "optimizer": {"name": name}}, folder)
        assert train(recipe, folder / name, progress=False).steps == 24  # a label in one of them


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        ({"energy": 0, "forces": 0}, "0"),
        ({"energy": 0, "stages": [{"start": 0.5, "forces": 0}]}, "0.5"),
        ({"energy": 0, "forces": 0, "stages": [{"start": 0.25, "energy": 1}]}, "0"),
        ({"last": {"fraction": 0.25, "energy": 0, "forces": 0}}, "0.75"),
    ],
)
def test_a_loss_that_teaches_nothing_is_refused(values, loss, start):
    with pytest.raises(InputError, match=f"loss: energy, forces and stress all weigh 0 from {start} of the") as caught:
        make_recipe({**values, "loss": loss})
    assert "\n" not in str(caught.value)
    make_recipe({**values, "loss": loss, "denoising": {}})  # there is noise to find
    at_once = {"energy": 0, "forces": 0, "stages": [{"start": 0, "energy": 1}]}
    assert make_recipe({**values, "loss": at_once}).loss.start_without_weights is None
