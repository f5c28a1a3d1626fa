"""Ensembles: what members share, what they do not, and that their folder is a potential."""

import json

import pytest
import torch
from ase.build import molecule
from ase.io import read
from safetensors.torch import load_file

from equimd import EquimdCalculator, load_potential
from equimd.errors import InputError
from equimd.models.ensemble import EnsemblePotential
from equimd.training import loop
from equimd.training.distributed import StoppedError
from equimd.training.members import member_recipe, train_members
from equimd.training.recipe import make_recipe


@pytest.fixture
def recipe(folder, values):
    values["data"]["test"] = "test.xyz"
    return make_recipe(values, folder)


def test_an_ensemble_is_trained_loaded_and_measured(recipe, folder):
    result = train_members(recipe, folder / "run", 2, progress=False)
    assert json.loads((folder / "run" / "ensemble.json").read_text())["members"] == ["member-1", "member-2"]
    assert result.seeds == [3, 4]
    weights = [load_file(folder / "run" / name / "model.safetensors") for name in result.members]
    assert not torch.equal(weights[0]["scale"] * 0 + 1, weights[0]["scale"])  # scaled by the data, which are the same
    assert torch.equal(weights[0]["scale"], weights[1]["scale"])
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    potential = load_potential(folder / "run", dtype="float64")
    assert isinstance(potential, EnsemblePotential)
    assert potential.header["ledger"]["device_hours"] == result.device_hours
    alone = [load_potential(folder / "run" / name).header["ledger"] for name in result.members]
    for key in ("steps", "frames_seen", "hours"):
        assert potential.header["ledger"][key] == sum(ledger[key] for ledger in alone)
    frames = read(folder / "test.xyz", ":")
    forces = []
    for source in (folder / "run", *(folder / "run" / name for name in result.members)):
        calculator = EquimdCalculator(str(source), dtype="float64")
        forces.append([torch.from_numpy(calculator.get_forces(atoms.copy())) for atoms in frames])
    mean, one, other = (torch.cat(f) for f in forces)
    torch.testing.assert_close(mean, (one + other) / 2, rtol=1e-10, atol=1e-12)

    # What the file says, from its definition.
    error = mean - torch.cat([torch.from_numpy(atoms.get_forces()) for atoms in frames])
    spread = torch.stack([one, other]).std(0)
    assert result.split == "test"
    assert result.mean.force_mae == pytest.approx(float(error.abs().mean()), rel=1e-9)
    assert result.spread_rms == pytest.approx(float(spread.square().mean().sqrt()), rel=1e-9)
    expected = torch.corrcoef(torch.stack([spread.norm(dim=1), error.norm(dim=1)]))[0, 1]
    assert result.correlation == pytest.approx(float(expected), rel=1e-6)
    single = [errors.force_mae for errors in result.errors]
    assert all(mae is not None and result.mean.force_mae <= max(single) for mae in single)


def test_an_interrupted_ensemble_continues_where_it_was(recipe, folder, monkeypatch):
    whole = train_members(recipe, folder / "whole", 2, progress=False)
    original, steps = loop._Training.step, []

    def step(self, epoch):
        steps.append(self.recipe.seed)
        self.world.signal = "SIGTERM" if len(steps) == 15 else None  # of ten for each
        original(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", step)
        with pytest.raises(StoppedError):
            train_members(recipe, folder / "run", 2, progress=False)
        assert not (folder / "run" / "ensemble.json").exists()
        again = train_members(recipe, folder / "run", 2, resume=True, progress=False)
    assert steps == [3] * 10 + [4] * 5 + [4] * 6  # the step that was asked for as the signal came is done later
    assert again.mean == whole.mean
    more = train_members(recipe, folder / "run", 3, resume=True, progress=False)
    assert more.errors[:2] == whole.errors


def test_members_share_their_frames_unless_they_are_bagged(recipe):
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"n_train": 12})})
    plain = [member_recipe(recipe, k, bagging=False) for k in (1, 2)]
    assert [r.seed for r in plain] == [3, 4]
    assert [r.data.seed for r in plain] == [3, 3]
    assert plain[1].path("x") == recipe.path("x")
    bagged = [member_recipe(recipe, k, bagging=True) for k in (1, 2)]
    assert [r.data.seed for r in bagged] == [3, 4]


def test_bagged_members_draw_frames_of_their_own(values, folder):
    values |= {"steps": 1, "data": values["data"] | {"n_train": 5}}
    train_members(make_recipe(values, folder), folder / "plain", 2, progress=False)
    train_members(make_recipe(values, folder), folder / "bagged", 2, bagging=True, progress=False)
    scales = {
        name: [float(load_file(folder / name / f"member-{k}" / "model.safetensors")["scale"][0]) for k in (1, 2)]
        for name in ("plain", "bagged")
    }
    assert scales["plain"][0] == scales["plain"][1] == scales["bagged"][0]
    assert scales["bagged"][0] != scales["bagged"][1]  # the RMS of other forces


def test_one_training_and_an_ensemble_do_not_share_a_folder(values, folder):
    recipe = make_recipe({**values, "steps": 1}, folder)
    loop.train(recipe, folder / "one", progress=False)
    with pytest.raises(InputError, match=r"state.safetensors there is of one training; leave --members out"):
        train_members(recipe, folder / "one", 2, resume=True, progress=False)
    (folder / "several" / "member-1").mkdir(parents=True)
    with pytest.raises(InputError, match="it holds an ensemble; give --members"):
        loop.train(recipe, folder / "several", resume=True, progress=False)


def test_refusals(recipe, folder):
    with pytest.raises(InputError, match="--members is 1; accepted are 2 to 100"):
        train_members(recipe, folder / "run", 1, progress=False)
    with pytest.raises(InputError, match=r"--bagging needs data.n_train"):
        train_members(recipe, folder / "run", 2, bagging=True, progress=False)
    assert not (folder / "run").exists()
    (folder / "run").mkdir()
    for content in ("{", "[]", "{}", '{"members": ["../whole"]}', '{"members": "member-1"}', '{"members": [1]}'):
        (folder / "run" / "ensemble.json").write_text(content)
        with pytest.raises(InputError, match="holds no list 'members'"):
            load_potential(folder / "run")
    (folder / "run" / "ensemble.json").write_text('{"members": ["member-1", "member-2"]}')
    with pytest.raises(InputError, match="cannot read .*member-1"):
        EquimdCalculator(str(folder / "run")).get_forces(molecule("H2O"))
