"""Fine-tuning: what a training that starts from a checkpoint keeps, freezes and corrects."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from test_loop import Killed, assert_same_run
from training_samples import E0, TINY, spring_frames

from equimd.errors import InputError
from equimd.models.checkpoint import load_checkpoint, save_checkpoint
from equimd.training import initial, train
from equimd.training.distributed import World
from equimd.training.recipe import make_recipe
from equimd.training.setup import prepare
from equimd.training.validation import evaluate

FAMILIES = ("equivariant", "transformer")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def parent(folder, values, family):
    """The file of a potential of H, C and O that was trained for some steps; ``values`` then fine-tune it."""
    values |= {"model": dict(TINY[family]), "steps": 8, "optimizer": {"lr": 1e-2}, "name": "parent"}
    train(make_recipe(values, folder), folder / "parent", progress=False)
    values |= {"name": "child", "init_from": "parent/model.safetensors", "seed": 9}
    del values["model"]
    return folder / "parent" / "model.safetensors"


def set_up(values, folder, **changes):
    return prepare(make_recipe({**values, **changes}, folder), torch.device("cpu"))


def predictions(potential, frames):
    return potential.requires_grad_(False)(frames.batch(torch.arange(len(frames))))  # all by the same kernels


# --- step 0 -----------------------------------------------------------------------------------------------------------


def test_it_starts_with_what_the_parent_predicts(folder, values, parent):
    old, _ = load_checkpoint(parent, dtype="float64")
    found = set_up(values, folder)
    assert found.potential.settings == old.settings  # the number of neighbours included
    for name, tensor in old.state_dict().items():
        assert torch.equal(found.potential.state_dict()[name], tensor), name
    wanted, got = predictions(old, found.valid), predictions(found.average, found.valid)
    assert torch.equal(got.energy, wanted.energy)
    assert torch.equal(got.forces, wanted.forces)
    assert all(p.requires_grad for p in found.potential.parameters())
    anew = set_up(values, folder, init_from=None, model=old.settings.model_dump())
    assert not torch.allclose(predictions(anew.average, found.valid).forces, wanted.forces)


def with_nitrogen(folder):
    """Isolated-atom energies of a training set ``nitrogen.xyz`` that has ammonia besides, bound by 7 eV."""
    energies, rng = {**E0, "N": -60.0}, np.random.default_rng(0)
    frames = spring_frames(18, 5)
    for _ in range(8):
        atoms = molecule("NH3")
        atoms.rattle(0.05, rng=rng)
        energy = sum(energies[s] for s in atoms.get_chemical_symbols()) - 7.0
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=rng.normal(0, 0.1, (4, 3)))
        frames.append(atoms)
    write(folder / "nitrogen.xyz", frames, format="extxyz")
    return energies


def test_new_elements_leave_predictions_of_old_ones_unchanged(folder, values, parent):
    energies = with_nitrogen(folder)
    old, _ = load_checkpoint(parent, dtype="float64")
    data = {**values["data"], "train": "nitrogen.xyz", "isolated_atom_energies": energies}
    found = set_up(values, folder, data=data)
    assert found.potential.species == (1, 6, 7, 8)
    wanted, got = predictions(old, found.valid), predictions(found.average, found.valid)
    torch.testing.assert_close(got.energy, wanted.energy, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.forces, wanted.forces, rtol=0, atol=1e-10)  # of forces of 1
    # The new element's shift alone was fitted, so that its molecules begin with about the right energy.
    new = [k for k in range(len(found.train)) if 7 in found.train.batch(torch.tensor([k])).atomic_numbers]
    graph = found.train.batch(torch.tensor(new))
    error = (found.average(graph).energy - graph.energy).abs().mean()
    assert float(error) < 0.5  # eV, of molecules bound by 7 eV
    table = found.potential.state_dict()[next(iter(found.potential.species_tables))]
    known = table[[0, 1, 3]]
    assert not torch.equal(table[2], known.mean(0))
    size = known.square().mean().sqrt()
    assert float((table[2] - known.mean(0)).abs().max()) < 0.5 * float(size)  # noise of a tenth
    result = train(make_recipe({**values, "data": data}, folder), folder / "run", progress=False)
    assert result.steps == 8


def test_elements_that_the_data_lack_are_dropped_or_kept(folder, values, parent):
    old, _ = load_checkpoint(parent, dtype="float64")
    for seed, split in ((7, "train"), (8, "valid")):
        write(folder / f"water-{split}.xyz", spring_frames(6, seed, names=("H2O",)), format="extxyz")
    data = {"train": "water-train.xyz", "valid": "water-valid.xyz", "isolated_atom_energies": {"H": -10.0, "O": -102.0}}
    dropped = set_up(values, folder, data=data)
    assert dropped.potential.species == (1, 8)
    init = {"checkpoint": "parent/model.safetensors", "keep_elements": True}
    kept = set_up(values, folder, data=data, init_from=init)
    assert kept.potential.species == (1, 6, 8)
    assert kept.potential.isolated_atom_energies[6] == E0["C"]  # the parent's
    wanted = predictions(old, kept.valid)
    for found in (dropped, kept):
        got = predictions(found.average, kept.valid)
        torch.testing.assert_close(got.energy, wanted.energy, rtol=0, atol=1e-10)
        torch.testing.assert_close(got.forces, wanted.forces, rtol=0, atol=1e-10)
    for name, n_axes in kept.potential.species_tables.items():
        table = kept.potential.state_dict()[name].unflatten(0, (3,) * n_axes)
        for axis in range(n_axes):
            table = table.index_select(axis, torch.tensor([0, 2]))
        assert torch.equal(dropped.potential.state_dict()[name], table.flatten(0, n_axes - 1))


def at_another_level(folder):
    """The same frames with other isolated-atom energies, and bound by 3 eV less per atom of O, as a shift can tell."""
    for split in ("train", "valid"):
        frames = read(folder / f"{split}.xyz", ":")
        for atoms in frames:
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            energy += sum({"H": -5.0, "C": 40.0, "O": 103.0}[s] for s in atoms.get_chemical_symbols())
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        write(folder / f"other-{split}.xyz", frames, format="extxyz")
    energies = {"H": -15.0, "C": -8.0, "O": -2.0}  # so that 3 eV per O remain
    return {"train": "other-train.xyz", "valid": "other-valid.xyz", "isolated_atom_energies": energies}


def test_another_level_of_theory_gets_other_shifts_and_the_same_scale(folder, values, parent):
    old, _ = load_checkpoint(parent, dtype="float64")
    data = at_another_level(folder)
    errors = {}
    for shift in ("auto", "refit", "keep"):
        init = {"checkpoint": "parent/model.safetensors", "shift": shift}
        found = set_up(values, folder, data=data, init_from=init)
        assert torch.equal(found.potential.scale, old.scale)
        assert found.potential.isolated_atom_energies == {1: -15.0, 6: -8.0, 8: -2.0}
        errors[shift] = evaluate(found.average, found.valid, False, World(), 12_000).energy_per_atom_mae
        if shift == "keep":
            assert torch.equal(found.potential.shift, old.shift)
    assert errors["auto"] == errors["refit"]
    # The shift takes 3 eV per O, up to a third of a molecule's atoms; the parent's own error of 0.01 eV/atom remains.
    assert errors["auto"] < 0.05 * errors["keep"]
    for energies in (dict(E0), None):  # given, or taken from the parent
        same = set_up(values, folder, data={**values["data"], "isolated_atom_energies": energies})
        assert same.potential.isolated_atom_energies == old.isolated_atom_energies
        assert torch.equal(same.potential.shift, old.shift)  # auto keeps it on the same level


def test_isolated_atoms_among_the_frames_tell_the_level(folder, values, parent):
    old, _ = load_checkpoint(parent, dtype="float64")
    data = {**at_another_level(folder), "isolated_atom_energies": None}
    with pytest.raises(InputError, match=r"are \d+.* eV/atom off the labels .* set init_from.shift: refit") as said:
        set_up(values, folder, data=data)
    assert "\n" not in str(said.value)
    for shift in ("refit", "keep"):
        init = {"checkpoint": "parent/model.safetensors", "shift": shift}
        found = set_up(values, folder, data=data, init_from=init)
        assert found.header["isolated_atom_energies_from"] == dict.fromkeys("HCO", "parent")
    set_up(values, folder, data=data, loss={"energy": 0.0})  # energies do not matter

    frames = read(folder / "other-train.xyz", ":")
    for symbol, energy in (("H", -15.0), ("O", -2.0)):
        atom = Atoms(symbol, info={"config_type": "IsolatedAtom"})
        atom.calc = SinglePointCalculator(atom, energy=energy, forces=np.zeros((1, 3)))
        frames.append(atom)
    write(folder / "other-train.xyz", frames, format="extxyz")
    found = set_up(values, folder, data=data)
    assert found.potential.isolated_atom_energies == {1: -15.0, 6: E0["C"], 8: -2.0}
    assert found.header["isolated_atom_energies_from"] == {"H": "isolated atoms", "C": "parent", "O": "isolated atoms"}
    assert not torch.equal(found.potential.shift, old.shift)
    error = evaluate(found.average, found.valid, False, World(), 12_000).energy_per_atom_mae
    assert error is not None
    assert error < 0.05  # eV/atom; the parent's own error is 0.01
    kept = set_up(values, folder, data={**data, "isolated_atom_energies": dict(E0)}, loss={"energy": 0.0})
    assert set(kept.header["isolated_atom_energies_from"].values()) == {"recipe"}


def test_residual_shifts_recover_what_was_added(folder, values, parent):
    found = set_up(values, folder)
    potential = found.average
    exact = predictions(potential, found.train).energy
    found.train.energy[:] = exact
    for k in range(len(found.train)):
        z = found.train.batch(torch.tensor([k])).atomic_numbers
        found.train.energy[k] += 0.5 * int((z == 1).sum()) - 2.0 * int((z == 8).sum())
    found.train.energy[3] = float("nan")
    assert initial.residual_shifts(potential, found.train, [1, 6, 8]) == pytest.approx([0.5, 0.0, -2.0], abs=1e-9)
    found.train.energy[:] = float("nan")
    assert initial.residual_shifts(potential, found.train, [1, 6]) == [0.0, 0.0]


# --- frozen parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("part", ["embedding", "layers", "readout"])
def test_frozen_parameters_do_not_move_and_others_do(folder, values, parent, part, optimizer):
    old, _ = load_checkpoint(parent, dtype="float64")
    values["init_from"] = {"checkpoint": "parent/model.safetensors", "freeze": [part]}
    values["optimizer"] = {"name": optimizer, "lr": 1e-2, "weight_decay": 0.1}
    train(make_recipe(values, folder), folder / "run", progress=False)
    new, header = load_checkpoint(folder / "run" / "last.safetensors", dtype="float64")
    frozen = initial.freeze(old, [part])
    moved = {n for n, p in new.named_parameters() if not torch.equal(p, dict(old.named_parameters())[n])}
    assert frozen
    assert moved == {n for n, _ in new.named_parameters()} - frozen
    assert [ancestor["name"] for ancestor in header["ancestry"]] == ["parent"]


def test_gradients_of_partly_frozen_potentials_are_those_of_all(folder, values, parent, family):
    whole = set_up(values, folder)
    graph = whole.train.batch(torch.arange(6))

    def gradients(potential):
        prediction = potential.predict_trainable(graph)
        (prediction.forces.square().mean() + prediction.energies.square().mean()).backward()
        return {n: p.grad for n, p in potential.named_parameters()}

    wanted = gradients(whole.potential)
    for pattern in ("layers", "radial", "readout", "embedding") if family == "equivariant" else ("layers", "readout"):
        part = set_up(values, folder, init_from={"checkpoint": "parent/model.safetensors", "freeze": [pattern]})
        assert not part.potential.has_frozen_network  # some of its weights change
        frozen = {n for n, p in part.potential.named_parameters() if not p.requires_grad}
        for name, gradient in gradients(part.potential).items():
            assert (gradient is None) == (name in frozen or wanted[name] is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-13)


def test_patterns_of_names(folder, values, parent):
    found = set_up(values, folder).potential
    layer = "layers.0" if found.family == "equivariant" else "transformers.0.0"
    names = {n for n, _ in found.named_parameters()}
    assert initial.freeze(found, [f"{layer}"]) == {n for n in names if n.startswith(layer)}
    weights = initial.freeze(found, ["*.weight"])
    assert weights == {n for n in names if n.endswith(".weight")}
    for freeze, said in (
        (["layer"], r"init_from.freeze: 'layer' is no parameter; accepted are embedding, layers"),
        (["*"], "which is every parameter; nothing is left to train"),
    ):
        with pytest.raises(InputError, match=said):
            set_up(values, folder, init_from={"checkpoint": "parent/model.safetensors", "freeze": freeze})
    energies = with_nitrogen(folder)
    data = {**values["data"], "train": "nitrogen.xyz", "isolated_atom_energies": energies}
    init = {"checkpoint": "parent/model.safetensors", "freeze": ["embedding"]}
    with pytest.raises(InputError, match=r"has no atomic number 7, whose row is to be trained"):
        set_up(values, folder, data=data, init_from=init)


# --- which checkpoint -------------------------------------------------------------------------------------------------


def test_a_resume_equals_an_uninterrupted_training(folder, values, parent, monkeypatch):
    from equimd.training import loop

    values |= {"steps": 10, "checkpoint": {"steps": 3, "minutes": None}, "data": at_another_level(folder)}
    values["init_from"] = {"checkpoint": "parent", "freeze": ["readout"]}  # a folder
    recipe = make_recipe(values, folder)
    train(recipe, folder / "whole", progress=False)
    count, original = 0, loop._Training.step

    def dies(self, *arguments):
        nonlocal count
        count += 1
        if count == 8:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", dies)
        with pytest.raises(Killed):
            train(recipe, folder / "killed", progress=False)
    train(recipe, folder / "killed", resume=True, progress=False)
    assert_same_run(folder / "killed", folder / "whole")
    other, header = load_checkpoint(parent, dtype="float64")
    other.shift[0] += 1.0
    save_checkpoint(parent, other, header)
    with pytest.raises(InputError, match="cannot resume .* ancestry was"):
        train(recipe, folder / "killed", resume=True, progress=False)


def test_ancestry_grows(folder, values, parent):
    train(make_recipe(values, folder), folder / "child", progress=False)
    values |= {"name": "grandchild", "init_from": "child"}
    train(make_recipe(values, folder), folder / "grandchild", progress=False)
    _, header = load_checkpoint(folder / "grandchild" / "model.safetensors")
    assert [ancestor["name"] for ancestor in header["ancestry"]] == ["parent", "child"]
    assert all(len(ancestor["sha256"]) == 64 for ancestor in header["ancestry"])
    assert header["recipe"]["model"]["cutoff"] == 3.0  # the recipe that travels has the model in full


def test_another_architecture_is_refused_in_one_line(folder, values, parent, family):
    other = next(name for name in FAMILIES if name != family)
    width = "n_channels" if family == "equivariant" else "d_model"
    cases = [
        ({"family": other}, f"is of the {family} family, model.family is '{other}'"),
        ({"family": family, "cutoff": 4.0}, "has cutoff 3.0, model.cutoff is 4.0; leave it out"),
        ({width: 16}, f"model.{width} is 16"),
    ]
    for model, said in cases:
        with pytest.raises(InputError) as caught:
            train(make_recipe({**values, "model": model}, folder), folder / "run", progress=False)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()
    assert make_recipe({**values, "model": {"family": family, "cutoff": 3.0}}, folder).model.cutoff == 3.0
    for init, said in (
        ("nowhere", "no potential is called"),
        ({"checkpoint": "parent", "frezze": []}, "unknown key 'init_from.frezze'; did you mean 'freeze'"),
        ({"checkpoint": 3}, "init_from.checkpoint is 3"),
    ):
        with pytest.raises(InputError, match=said):
            make_recipe({**values, "model": {"family": family}, "init_from": init}, folder)


def test_a_shipped_potential_goes_by_its_name(values):
    values |= {"init_from": "ethanol-equivariant"}
    del values["model"]
    recipe = make_recipe(values, "nowhere")
    assert recipe.model.family == "equivariant"
    assert recipe.model.n_layers == 3
