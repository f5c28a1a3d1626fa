"""Every kind of bad input gets one line, exit code 2, and loses nothing."""

import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from tiny import water

from equimd.frames import write_frames


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unchanged(tmp_path):
    """Call it before; afterwards every file must hold the same bytes, and none may have come or gone."""
    before: dict[Path, str] = {}

    def snapshot() -> dict[Path, str]:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def remember():
        before.update(snapshot())

    yield remember
    assert snapshot() == before


def bent(change) -> Path:
    """A file with a water molecule after ``change``."""
    atoms = water()
    change(atoms)
    write_frames("bent.xyz", [atoms])
    return Path("bent.xyz")


def gold(atoms):
    atoms.numbers[0] = 79


def nan(atoms):
    atoms.positions[1, 2] = np.nan


def coincident(atoms):
    atoms.positions[2] = atoms.positions[1]


STRUCTURES = [(gold, "Au"), (nan, "nan"), (coincident, "apart")]


@pytest.mark.parametrize(("change", "says"), STRUCTURES)
@pytest.mark.parametrize("command", ["md", "throughput", "compare"])
def test_structures(command, change, says, potentials, refused, unchanged):
    path, potential = bent(change), potentials["equivariant"]
    unchanged()
    arguments = {
        "md": ("md", potential, path, "-o", "run.h5", "--steps", 5),
        "throughput": ("throughput", potential, path),
        "compare": ("compare", potential, "--structure", path, "--steps", 5),
    }
    assert says in refused(*arguments[command])


def test_empty_structure(potentials, refused, unchanged):
    Path("empty.xyz").write_text('0\nProperties=species:S:1:pos:R:3 pbc="F F F"\n')
    Path("nothing.xyz").write_text("")
    unchanged()
    assert "empty" in refused("md", potentials["equivariant"], "empty.xyz", "-o", "run.h5")
    assert "holds no frames" in refused("data", "inspect", "nothing.xyz")


def recipe(**changes) -> Path:
    values = {
        "name": "tiny",
        "model": {"family": "equivariant", "cutoff": 4.0, "n_layers": 1, "l_max": 1, "n_channels": 4},
        "data": {"train": "bare.xyz", "valid": "bare.xyz", "isolated_atom_energies": {"H": -10.7, "O": -102.5}},
        "steps": 2,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values | changes))
    return Path("recipe.yaml")


def test_recipe_typo(refused, unchanged):
    path = recipe(optimiser={"lr": 1e-3})
    unchanged()
    line = refused("train", path, "-o", "run")
    assert "optimiser" in line
    assert "did you mean 'optimizer'" in line


def test_recipe_value_and_override(refused, unchanged):
    path = recipe()
    unchanged()
    assert "optimizer.lr" in refused("train", path, "-o", "run", "--set", "optimizer.lr=-1")
    assert "key=value" in refused("train", path, "-o", "run", "--set", "optimizer.lr")
    assert "--bagging is for the members of an ensemble" in refused("train", path, "-o", "run", "--bagging")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["init_from=PARENT", "model.family=transformer"], "the equivariant family, model.family is 'transformer'"),
        (["init_from=PARENT", "model.n_channels=8"], "has n_channels 4, model.n_channels is 8"),
        (["init_from=PARENT", "init_from.shift=keep", "init_from.freeze=[embeding]"], "'embeding' is no parameter"),
        (["init_from=PARENT", "init_from.frozen=[embedding]"], "unknown key 'init_from.frozen'"),
        (["init_from=no-such-potential"], "no potential is called"),
        (["schedule.kind=plateau", "schedule.decay_fraction=0.5"], "which is for kind 'wsd'"),
        (["loss.stages=[{start: 0.5}, {start: 0.1}]"], "ascend"),
        (["ema.fraction=0.7"], "ema.fraction is 0.7"),
    ],
)
def test_fine_tuning_and_schedules(settings, says, potentials, labelled, refused, unchanged):
    path = recipe(
        model={},
        data={
            "train": str(labelled),
            "valid": str(labelled),
            "isolated_atom_energies": {"H": -10.7, "O": -102.5},
            "duplicates": "allow",
        },
    )
    if not any("init_from" in setting for setting in settings):
        settings = [*settings, "model.family=equivariant"]
    changes = [part for s in settings for part in ("--set", s.replace("PARENT", potentials["equivariant"]))]
    unchanged()
    assert says in refused("train", path, "-o", "run", *changes)


def test_missing_labels(potentials, refused, unchanged):
    write_frames("bare.xyz", [water()])
    path = recipe()
    unchanged()
    assert "labels" in refused("evaluate", potentials["equivariant"], "bare.xyz")
    assert "neither energies nor forces" in refused("train", path, "-o", "run")


def split(path: str, energies=(-138.0, -138.1, -138.2), start: float = 0.0, unit: float = 1.0, change=None) -> None:
    """A file of labelled water, no two frames alike; ``change`` is made to the second frame."""
    frames = []
    for k, energy in enumerate(energies):
        atoms = water()
        atoms.positions[1, 0] += start + 0.05 * k
        forces = unit * np.array([[0.5, 0.0, 0.0], [-0.5, 0.1, 0.0], [0.0, -0.1, 0.0]])
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        if k == 1 and change is not None:
            change(atoms)
        frames.append(atoms)
    write_frames(path, frames)


def nan_force(atoms):
    atoms.calc.results["forces"][1, 2] = np.nan


def nan_energy(atoms):
    atoms.calc.results["energy"] = np.nan


def endless_force(atoms):
    atoms.calc.results["forces"][2, 0] = np.inf


def golden(atoms):
    atoms.numbers[0] = 79
    atoms.calc.atoms = atoms.copy()


@pytest.mark.parametrize(
    ("train", "valid", "says"),
    [
        ({"change": nan_force}, {}, "train.xyz, frame 1: forces of atom 1 has a value that is not finite (nan)"),
        ({"change": nan_energy}, {}, "train.xyz, frame 1: energy has a value that is not finite (nan)"),
        ({"change": endless_force}, {}, "train.xyz, frame 1: forces of atom 2 has a value that is not finite (inf)"),
        ({"change": golden}, {}, "train.xyz has Au, which has no isolated-atom energy (first in frame 1)"),
        ({"unit": 100.0}, {}, "is it in kcal/mol/Å"),
        ({}, {"start": 0.05}, "2 of 3 frames of data.valid are in the training set too: 0 (training frame 1)"),
        ({}, {"energies": ()}, "valid.xyz holds no frames"),
        ({}, None, "valid.xyz: no such file"),
    ],
)
def test_data_that_cannot_be_trained_on(train, valid, says, refused, unchanged):
    split("train.xyz", **train)
    if valid is not None:
        split("valid.xyz", **{"start": 0.02, **valid})
    energies = {"H": -10.7, "O": -102.5}
    path = recipe(data={"train": "train.xyz", "valid": "valid.xyz", "isolated_atom_energies": energies})
    unchanged()
    assert says in refused("train", path, "-o", "run")


def test_a_full_disk_while_graphs_are_kept(run, unchanged, monkeypatch, tmp_path_factory):
    from equimd.frames import arrays
    from equimd.training import cache

    def full(self, chunk):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays, "IN_MEMORY", 0)
    monkeypatch.setattr(arrays.Writer, "append", full)
    kept = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(cache, "graphs_folder", lambda: kept)
    split("train.xyz")
    split("valid.xyz", start=0.02)
    path = recipe(data={"train": "train.xyz", "valid": "valid.xyz"})
    unchanged()
    result = run("train", path, "-o", "run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "No space left on device" in line
    assert "EQUIMD_CACHE" in line


def test_figures_of_data(labelled, refused, unchanged):
    unchanged()
    assert ".png, .svg, .pdf" in refused("data", "inspect", labelled, "--figure", "look.gif")
    assert "no folder" in refused("data", "inspect", labelled, "--figure", "nowhere/look.png")
    assert "positive" in refused("data", "inspect", labelled, "--cutoff", 0)
    assert "up to 30" in refused("data", "inspect", labelled, "--cutoff", 1e9)
    assert ".: is a folder" in refused("data", "inspect", ".")
    assert "'REF_enregy'" in refused("data", "inspect", labelled, "--key", "energy=REF_enregy")


def test_a_figure_that_cannot_be_written_leaves_the_numbers(labelled, run, monkeypatch):
    from matplotlib.figure import Figure

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    result = run("data", "inspect", labelled, "--figure", labelled.with_name("look.png"))
    assert result.exit_code == 1
    assert "RMS force" in result.stdout
    assert "Drawn in" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert "look.png: No space left on device" in line


def test_wrong_units(potentials, labelled, refused, run, unchanged):
    unchanged()
    line = refused("evaluate", potentials["equivariant"], labelled, "--unit", "energy=kcl/mol")
    assert "kcl/mol" in line
    assert "kcal/mol" in line
    assert "--unit" in refused("evaluate", potentials["equivariant"], labelled, "--unit", "mass=g")
    assert "accepted: ase, vasp" in refused("evaluate", potentials["equivariant"], labelled, "--key", "voigt=vaps")
    assert "accepted: 1 or -1" in refused("evaluate", potentials["equivariant"], labelled, "--key", "stress_sign=-2")
    assert run("evaluate", potentials["equivariant"], labelled, "--key", "stress_sign=-1").exit_code == 0


def test_implausible_units_are_warned_of(potentials, run, labelled):
    text = labelled.read_text().replace("0.50000000", "40.50000000").replace("0.5 ", "40.5 ")
    labelled.write_text(text)
    result = run("evaluate", potentials["equivariant"], labelled, "--json", "-")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("equimd: warning: ")
    assert "kcal/mol" in line


def test_checkpoints(potentials, labelled, refused, unchanged, tmp_path):
    whole = (Path(potentials["transformer"]) / "model.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("pickle.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))
    Path("text.safetensors").write_text("not a checkpoint at all")
    unchanged()
    assert "truncated" in refused("evaluate", "cut.safetensors", labelled)
    assert "pickle" in refused("evaluate", "pickle.safetensors", labelled)
    assert "text.safetensors" in refused("evaluate", "text.safetensors", labelled)
    assert "no potential is called" in refused("evaluate", "ethanol-equivarant", labelled)


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_never_executed(labelled, refused):
    Path("bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused("evaluate", "bomb.safetensors", labelled)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_output_of_compare_exists(kind, potentials, refused, unchanged):
    if kind == "folder":
        Path("out").mkdir()
        Path("out/results.json").write_text("precious")
    else:
        Path("out").write_text("precious")
    unchanged()
    line = refused("compare", potentials["equivariant"], "-o", "out", "--steps", 5)
    assert "out" in line
    assert kind == "file" or "--overwrite" in line


def test_output_of_md_and_train_exists(potentials, labelled, refused, unchanged):
    Path("run.h5").write_text("precious")
    Path("run").mkdir()
    Path("run/model.safetensors").write_text("precious")
    data = {"train": str(labelled), "valid": str(labelled), "isolated_atom_energies": {"H": -10.7, "O": -102.5}}
    path = recipe(data=data)
    unchanged()
    potential = potentials["equivariant"]
    assert "run.h5" in refused("md", potential, Path(potential) / "start.xyz", "-o", "run.h5", "--steps", 5)
    assert "exists" in refused("train", path, "-o", "run")


def test_names_and_numbers_that_no_run_can_have(potentials, refused, unchanged):
    potential = potentials["equivariant"]
    start = Path(potential) / "start.xyz"
    path = recipe()
    unchanged()
    assert "a folder" in refused("md", potential, start, "-o", "", "--steps", 1)
    assert "longer than this system allows" in refused("md", potential, start, "-o", 300 * "a" + ".h5", "--steps", 1)
    assert "no potential is called" in refused("evaluate", 300 * "a", start)
    for option, value in (("temperature", "inf"), ("friction", "inf"), ("pressure", "nan"), ("timestep", "nan")):
        assert f"{option}_" in refused("md", potential, start, "-o", "run.h5", f"--{option}", value)
    says = refused("train", path, "-o", "run", "--set", "model.cutoff_power=1000000000")
    assert "cutoff_power is 1000000000: Input should be less than or equal to 64" in says


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_full_disk(potentials, labelled, run):
    result = run("evaluate", potentials["equivariant"], labelled, "--json", "/dev/full")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "no space left on the disk" in line
    assert Path("/dev/full").is_char_device()


def test_full_disk_during_md_keeps_what_was_written(potentials, run, monkeypatch):
    import equimd.md.checkpoint as checkpoint

    written = []

    def full_later(path, text):
        written.append(path)
        if len(written) > 2:
            raise OSError(28, "No space left on device", str(path))
        path.write_text(text)

    monkeypatch.setattr(checkpoint, "write_text_atomically", full_later)
    potential = potentials["equivariant"]
    arguments = ("--steps", 20, "--stride", 1, "--checkpoint-every", 5)
    result = run("md", potential, Path(potential) / "start.xyz", "-o", "run.h5", *arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "no space left" in line
    from equimd.frames import read_list

    assert len(read_list("run.h5")) > 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compare", "--steps", 0), "steps"),
        (("compare", "--temperature", -1), "temperature"),
        (("compare", "--dtype", "float16"), "float32"),
        (("compare", "nothing-like-it"), "no potential is called"),
        (("compare", "--json", "nowhere/out.json"), "nowhere"),
        (("report", "nowhere"), "nowhere"),
        (("data", "inspect", "nowhere.xyz"), "nowhere.xyz"),
        (("md",), "POTENTIAL"),
        (("comapre",), "compare"),
    ],
)
def test_arguments(arguments, says, refused, unchanged):
    unchanged()
    assert says in refused(*arguments)


def test_atoms_that_are_no_molecule_of_the_reference(potentials, refused):
    write_frames("two.xyz", [Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])])
    line = refused("compare", potentials["equivariant"], "--structure", "two.xyz", "--reference", "dft")
    assert "gfn2-xtb" in line


def test_frames_of_another_charge(refused, potentials):
    ions = [water() for _ in range(3)]
    for atoms in ions:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0)
    ions[2].info["dft_total_charge"] = 1
    write_frames("ions.xyz", ions)
    line = refused("evaluate", potentials["equivariant"], "ions.xyz")
    assert "ions.xyz, frame 2: total charge is 1 e (dft_total_charge)" in line
    line = refused("evaluate", potentials["equivariant"], "ions.xyz", "--stride", 2)
    assert "ions.xyz, frame 2: total charge is 1 e" in line
