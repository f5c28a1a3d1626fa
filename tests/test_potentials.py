"""The shipped potentials are what their cards and the README say."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import yaml

from equimd.models.checkpoint import list_potentials, load_potential
from equimd.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "potentials").glob("*/card.yaml"))
MAX_BYTES = 3_000_000


def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "potentials" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_both_families_of_ethanol_are_shipped():
    assert {"ethanol-equivariant", "ethanol-transformer"} <= set(list_potentials())


def test_card_describes_the_weights_beside_it(folder):
    card = yaml.safe_load((folder / "card.yaml").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(weights) < MAX_BYTES
    potential = load_potential(folder.name)
    assert potential.family == card["family"]
    assert sum(p.numel() for p in potential.parameters()) == card["n_parameters"]
    assert (folder / "start.xyz").exists()


def test_no_path_of_the_machine_it_was_trained_on_is_shipped(folder):
    header = load_potential(folder.name).header
    stated = [header["recipe"]["data"][split] for split in ("train", "valid", "test")]
    files = [file for one in stated for file in ([one] if isinstance(one, str) else one)]
    files += yaml.safe_load((folder / "card.yaml").read_text())["data"]["sha256"]
    assert all(path.startswith("../../data/") for path in files)


BEFORE = {"optimizer": {"muon_split": False}}
"""What settings that came later stand for in weights from before them, where that is not their default."""


def differences(header: dict, recipe) -> list[str]:
    """Keys of the recipe that are not what the weights were trained with."""
    written = recipe.model_dump(mode="json")
    found = []
    for key in ("seed", "steps", "model", "loss", "augmentation", "denoising", "optimizer", "schedule", "ema", "batch"):
        trained, now = header["recipe"].get(key), written[key]
        if isinstance(now, dict):
            defaults = type(getattr(recipe, key))().model_dump(mode="json") if key not in ("model", "batch") else {}
            trained = defaults | BEFORE.get(key, {}) | (trained or {})
            if key == "model":  # the mean of the training set stands where the recipe has none
                now = {name: trained[name] if value is None else value for name, value in now.items()}
                trained = {name: trained.get(name, now[name]) for name in now}
            elif key == "batch":
                trained = {name: trained.get(name) for name in now}
        if trained != now:
            found.append(key)
    return found


def test_recipe_beside_the_weights_is_the_one_they_were_trained_with(folder):
    recipe = load_recipe(folder / "recipe.yaml")
    header = load_potential(folder.name).header
    assert differences(header, recipe) == []
    assert header["recipe"]["steps"] == header["ledger"]["steps"]
    assert header["family"] == recipe.model.family
    other = f"optimizer.muon_split={str(not recipe.optimizer.muon_split).lower()}"
    for key, override in (("optimizer", other), ("loss", "loss.energy=7"), ("ema", "ema.decay=0.5")):
        assert differences(header, load_recipe(folder / "recipe.yaml", [override])) == [key]


def test_readme_shows_the_table_of_the_cards():
    module = release()
    cards = [yaml.safe_load((folder / "card.yaml").read_text()) for folder in FOLDERS]
    assert module.table(cards) in (ROOT / "README.md").read_text()
    changed = [{**cards[0], "name": "another"}, *cards[1:]]
    assert module.table(changed) not in (ROOT / "README.md").read_text()
