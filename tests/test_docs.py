"""What the guides show can be used as it stands."""

import re
from pathlib import Path

import pytest
import yaml

from equimd.errors import InputError
from equimd.training.recipe import make_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = {
    "name": "example",
    "model": {"family": "equivariant", "cutoff": 5.0},
    "data": {"train": "train.xyz", "valid": "valid.xyz"},
    "steps": 10,
}


def snippets():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    inline = [s for s in re.findall(r"`([a-z_]+: \{[^`]*\})`", text) if "NAME" not in s]
    return [*re.findall(r"```yaml\n(.*?)```", text, re.DOTALL), *inline]


@pytest.mark.parametrize("snippet", snippets())
def test_every_piece_of_a_recipe_is_accepted(snippet):
    values = yaml.safe_load(snippet)
    base = {k: v for k, v in BASE.items() if not (k == "model" and "init_from" in values)}
    recipe = make_recipe(base | values)
    for key, section in values.items():
        assert getattr(recipe, key).model_dump(mode="json", exclude_unset=True) == section
    (key, section), *_ = values.items()
    with pytest.raises(InputError, match="unknown key"):
        make_recipe(base | {key: section | {"nonsense": 1}})


def test_pieces_are_found():
    assert len(snippets()) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
