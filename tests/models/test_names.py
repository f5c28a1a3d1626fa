"""One rule for names in every door: a bare name is a shipped potential's, ``./name`` is a path, a clash is said."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ase import Atoms
from openmm.app import Element, Topology
from openmmml import MLPotential

from equimd.calculators.ase import EquimdCalculator
from equimd.calculators.loading import potential_name
from equimd.calculators.openmm_entry import EquimdPotentialImplFactory
from equimd.calculators.openmm_force import EquimdForce
from equimd.cli.common import read_structure
from equimd.comparison import start_structure
from equimd.errors import InputError, NameWarning
from equimd.models import checkpoint
from equimd.models.checkpoint import build_potential, find_potential, load_potential, save_checkpoint
from equimd.models.transformer import TransformerSettings
from equimd.training.recipe import make_recipe, parent_file

NAME = "water-a"
SHIPPED, OWN = -13.0, -14.0  # eV of an isolated hydrogen atom: tells the two potentials apart


def save(folder: Path, energy: float) -> None:
    settings = TransformerSettings(d_model=16, n_heads=2, d_feedforward=16, cutoff=3.5)
    with torch.random.fork_rng():
        potential = build_potential(settings, (1,), {1: energy})
    folder.mkdir(parents=True)
    save_checkpoint(folder / "model.safetensors", potential, {})
    (folder / "start.xyz").write_text(f"2\nProperties=species:S:1:pos:R:3\nH 0 0 0\nH 0 0 {-energy / 10}\n")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry with one potential; the working directory is another folder, which is empty."""
    save(tmp_path / "registry" / NAME, SHIPPED)
    monkeypatch.setattr(checkpoint, "registry_folders", lambda: [tmp_path / "registry"])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "registry"


@pytest.fixture
def clash(registry):
    """The working directory holds another potential of the same name."""
    save(Path(NAME), OWN)


def by_ase(name):
    return EquimdCalculator(name, device="cpu", self_check=False).potential


def by_openmm(name):
    topology = Topology()
    topology.addAtom("H", Element.getBySymbol("H"), topology.addResidue("H", topology.addChain()))
    MLPotential.registerImplFactory("equimd", EquimdPotentialImplFactory())
    system = MLPotential("equimd", modelPath=name).createSystem(topology, device="cpu", selfCheck=False)
    assert any(force.getName() == "EquimdForce" for force in system.getForces())
    return EquimdForce(name, Atoms("H").numbers, device="cpu").prepare().potential


def by_init_from(name):
    recipe = make_recipe(
        {
            "name": "x",
            "init_from": {"checkpoint": str(name)},
            "data": {"train": "a.xyz", "valid": "b.xyz"},
            "steps": 1,
        }
    )
    assert recipe.init_from is not None
    return load_potential(parent_file(recipe.init_from.checkpoint, recipe.path(".")), device="cpu")


DOORS = [lambda name: load_potential(name, device="cpu"), by_ase, by_openmm, by_init_from]
IDS = ["load_potential", "ase", "openmm", "init_from"]


@pytest.mark.parametrize("door", DOORS, ids=IDS)
def test_a_bare_name_is_the_shipped_potential_and_a_path_is_the_folder(clash, door):
    with pytest.warns(NameWarning, match=f"'{NAME}' is the potential that comes with equimd.*'./{NAME}'") as said:
        assert door(NAME).isolated_atom_energies == {1: SHIPPED}
    assert all("\n" not in str(w.message) for w in said)
    for path in (f"./{NAME}", f"{NAME}/", f"{NAME}/model.safetensors", str(Path(NAME).resolve()), f"../work/{NAME}"):
        assert door(path).isolated_atom_energies == {1: OWN}  # and no warning, which would be an error here


@pytest.mark.parametrize("door", DOORS, ids=IDS)
def test_without_a_clash_nothing_is_said(registry, door):
    assert door(NAME).isolated_atom_energies == {1: SHIPPED}
    with pytest.raises(InputError, match="no potential is called"):
        door(f"./{NAME}")
    save(Path("mine"), OWN)
    assert door("mine").isolated_atom_energies == {1: OWN}  # a bare name that is no potential's is a path


def test_a_path_object_means_what_lies_there(registry):
    assert find_potential(Path(NAME)) == registry / NAME
    save(Path(NAME), OWN)
    assert find_potential(Path("./" + NAME)) == Path(NAME)


def test_the_registry_is_no_clash_with_itself(registry, monkeypatch):
    monkeypatch.chdir(registry)
    assert find_potential(NAME) == registry / NAME
    assert potential_name(f"./{NAME}") == NAME


def test_names_relative_to_a_recipe(registry):
    """``init_from`` starts at the recipe's folder, with the same rule."""
    folder = Path("recipes")
    save(folder / NAME, OWN)
    with pytest.warns(NameWarning, match="recipes/water-a is not used"):
        assert parent_file(NAME, folder) == registry / NAME / "model.safetensors"
    assert parent_file(f"./{NAME}", folder) == folder / NAME / "model.safetensors"
    with pytest.raises(InputError, match="no potential is called './water-a'"):
        parent_file(f"./{NAME}", Path())


def test_structures_follow_the_rule(clash):
    with pytest.warns(NameWarning):
        assert read_structure(NAME).positions[1, 2] == -SHIPPED / 10
    assert read_structure(f"./{NAME}/start.xyz").positions[1, 2] == -OWN / 10
    with pytest.warns(NameWarning):
        assert start_structure([NAME], None).positions[1, 2] == -SHIPPED / 10
    assert start_structure([f"./{NAME}"], None).positions[1, 2] == -OWN / 10


def test_a_file_without_ending_is_a_structure_unless_its_name_is_shipped(registry):
    Path("frame.xyz").write_text("1\n\nHe 0 0 0\n")
    assert read_structure("frame.xyz").symbols[0] == "He"
    shutil.copy("frame.xyz", NAME)
    with pytest.warns(NameWarning, match=f"./{NAME} is not used"):
        assert read_structure(NAME).symbols[0] == "H"


def test_tables_tell_the_two_apart(clash):
    """No table calls the user's potential by the shipped one's name."""
    save(Path("runs") / NAME, OWN)
    save(Path("runs") / "mine", OWN)
    shutil.copy(Path(NAME) / "model.safetensors", f"{NAME}.safetensors")
    for name in (NAME, find_potential(Path(checkpoint.registry_folders()[0]) / NAME)):
        assert potential_name(name) == NAME
    for path in (f"./{NAME}", f"{NAME}/model.safetensors", f"{NAME}.safetensors", Path(NAME).resolve()):
        assert potential_name(path) == f"work/{NAME}"
    assert potential_name(f"runs/{NAME}") == f"runs/{NAME}"
    assert potential_name("runs/mine/model.safetensors") == "mine"


@pytest.mark.parametrize("name", ["a" * 5000, "\0", "x/\0", ".", "..", "/"])
def test_text_that_no_file_can_have_is_refused_in_one_line(registry, name):
    with pytest.raises(InputError) as caught:
        find_potential(name)
    assert "\n" not in str(caught.value)


def test_the_command_line_says_a_clash_once(tmp_path):
    """With the real registry, and a potential that lies in the working directory."""
    name = checkpoint.list_potentials()[0]
    shutil.copytree(find_potential(name), tmp_path / name)
    code = (
        "import sys; from equimd.cli.errors import _plain_warnings\n"
        "from equimd.cli.common import read_structure; from equimd.models.checkpoint import find_potential\n"
        "with _plain_warnings():\n"
        "    find_potential(sys.argv[1]); find_potential(sys.argv[1]); read_structure(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, name], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("equimd: ")]
    assert len(lines) == 1
    assert f"'./{name}'" in lines[0]
