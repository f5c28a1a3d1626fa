import json

import pytest
import yaml
from training_samples import TINY

from equimd.errors import InputError
from equimd.training.dataset import read_data
from equimd.training.recipe import load_recipe, make_recipe


def test_units_and_keys_of_a_recipe_are_those_of_the_readers():
    from dataclasses import asdict

    from equimd.frames import LabelKeys, UnitSpec
    from equimd.training.sections import KeysSection, UnitsSection

    assert UnitsSection().model_dump() == asdict(UnitSpec())
    assert KeysSection().model_dump() | {"finite": True} == asdict(LabelKeys())


def test_defaults_follow_the_family(values):
    recipe = make_recipe(values)
    assert recipe.rotates
    values["model"] = {"family": "equivariant"}
    assert not make_recipe(values).rotates
    values["augmentation"] = {"rotate": True}
    assert make_recipe(values).rotates


@pytest.mark.parametrize(
    ("section", "typo", "nearest"),
    [
        (None, "epoch", "epochs"),
        ("optimizer", "learning_rate", "lr"),
        ("optimizer", "weight_decy", "weight_decay"),
        ("model", "d_modle", "d_model"),
        ("loss", "force", "forces"),
        ("early_stopping", "patiense", "patience"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_name(values, section, typo, nearest):
    target = values if section is None else values.setdefault(section, {})
    target[typo] = 1
    with pytest.raises(InputError) as caught:
        make_recipe(values)
    message = str(caught.value)
    assert "\n" not in message
    assert typo in message
    assert f"did you mean {nearest!r}" in message or nearest in message.split("accepted are")[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": {"lr": -1}}, "optimizer.lr is -1"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name is 'sgd'"),
        ({"model": {"family": "mace"}}, "mace"),
        ({"steps": None}, "accepted are epochs, steps or max_minutes"),
        ({"epochs": 3}, "epochs is 3 and steps is 10; one of them is accepted"),
        ({"batch": {}}, "n_frames"),
        ({"data": {"train": "a"}}, "data.valid"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"max_minutes": float("inf")}, "max_minutes is inf: Input should be a finite number"),
        ({"loss": {"energy": float("inf")}}, "loss.energy is inf: Input should be a finite number"),
        ({"optimizer": {"betas": [0.9, float("nan")]}}, "optimizer.betas.1 is nan: Input should be a finite number"),
        ({"model": {"family": "equivariant", "avg_num_neighbors": float("inf")}}, "avg_num_neighbors is inf"),
        (
            {"data": {"train": "a", "valid": "b", "isolated_atom_energies": {"H": float("nan")}}},
            "isolated_atom_energies",
        ),
    ],
)
def test_bad_values_are_one_line(values, change, said):
    with pytest.raises(InputError) as caught:
        make_recipe({**values, **change})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_overrides_and_paths(tmp_path, values):
    (tmp_path / "in").mkdir()
    values["data"]["isolated_atom_energies"] = "info.json"
    (tmp_path / "in" / "info.json").write_text(json.dumps({"isolated_atom_energies": {"H": -1.0}, "more": 1}))
    path = tmp_path / "in" / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(path, ["optimizer.lr=1e-4", "loss.last.fraction=0.1", "steps=7"])
    assert recipe.optimizer.lr == 1e-4
    assert recipe.loss.last is not None
    assert recipe.loss.last.fraction == 0.1
    assert recipe.steps == 7
    assert recipe.path(recipe.data.train) == tmp_path / "in" / "train.xyz"
    assert recipe.isolated_atom_energies() == {1: -1.0}
    with pytest.raises(InputError, match="key=value"):
        load_recipe(path, ["steps"])
    with pytest.raises(InputError, match="did you mean 'steps'"):
        load_recipe(path, ["stepps=3"])


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", ""])
def test_files_that_are_no_recipe(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="recipe"):
        load_recipe(path)
    with pytest.raises(InputError, match="cannot read"):
        load_recipe(tmp_path / "missing.yaml")


def test_isolated_atom_energies_are_checked(tmp_path, values):
    values["data"]["isolated_atom_energies"] = {"Xx": 1.0}
    with pytest.raises(InputError, match="'Xx'"):
        make_recipe(values).isolated_atom_energies()
    values["data"]["isolated_atom_energies"] = "info.json"
    with pytest.raises(InputError, match="cannot read"):
        make_recipe(values, tmp_path).isolated_atom_energies()
    (tmp_path / "info.json").write_text('{"isolated_atom_energies": {"H": Infinity}}')
    with pytest.raises(InputError, match=r"data.isolated_atom_energies of H is inf; accepted are finite numbers of eV"):
        make_recipe(values, tmp_path).isolated_atom_energies()
    (tmp_path / "info.json").write_text("{}")
    with pytest.raises(InputError, match="holds no table"):
        make_recipe(values, tmp_path).isolated_atom_energies()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 10**18}, "steps is 1000000000000000000"),
        ({"steps": None, "epochs": 10**400}, "epochs is "),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"batch": {"n_frames": 10**12}}, "batch.n_frames is 1000000000000"),
        ({"n_threads": 10**6}, "n_threads is 1000000"),
        ({"validation": {"degree": 10**6}}, "validation.degree is 1000000"),
        ({"validation": {"n_rotations": 10**9}}, "validation.n_rotations is 1000000000"),
        ({"augmentation": {"copies": 10**9}}, "augmentation.copies is 1000000000"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer.betas.1 is 1.5"),
        ({"optimizer": {"lr": 1e9}}, "optimizer.lr is 1000000000"),
    ],
)
def test_numbers_that_would_take_for_ever_are_refused(values, change, says):
    with pytest.raises(InputError, match=says) as caught:
        make_recipe({**values, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_defaults_are_what_ships(values, family):
    recipe = make_recipe({**values, "model": TINY[family]})
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.loss.kind) == ("muon", 8e-3, "mae")
    spelt = make_recipe({**values, "optimizer": {"name": "adamw"}, "loss": {"kind": "mse"}})
    assert (spelt.optimizer.name, spelt.optimizer.lr, spelt.loss.kind) == ("adamw", 2e-3, "mse")


def test_a_device_that_never_ends(folder, values):
    with pytest.raises(InputError, match="/dev/zero has more than 4 MiB"):
        load_recipe("/dev/zero")
    values["data"]["train"] = "/dev/zero"
    with pytest.raises(InputError, match="/dev/zero: is a device, a pipe or a socket; accepted: a regular file"):
        read_data(make_recipe(values, folder))
