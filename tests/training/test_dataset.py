"""What a recipe's data must satisfy before a training begins, and what is found out about it."""

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from training_samples import E0, spring_frames

from equimd.errors import InputError
from equimd.frames import arrays as arrays_module
from equimd.frames import read_list, write_frames
from equimd.models.checkpoint import load_checkpoint
from equimd.origin import mark
from equimd.training import cache, train
from equimd.training.dataset import read_data
from equimd.training.recipe import make_recipe
from equimd.units import HARTREE, KCAL_PER_MOL


@pytest.fixture
def read(folder, values):
    """Read the data of the recipe with changes to its section."""

    def run(**changes):
        return read_data(make_recipe({**values, "data": {**values["data"], **changes}}, folder))

    return run


@pytest.fixture
def kept_small(tmp_path, monkeypatch):
    """A cache of its own, which keeps small sets too."""
    monkeypatch.setattr(cache, "graphs_folder", lambda: tmp_path / "cache" / "graphs")
    monkeypatch.setattr(arrays_module, "IN_MEMORY", 0)


def rewrite(path, change):
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_text(changed)


def isolated(symbol: str, energy: float) -> Atoms:
    atoms = Atoms(symbol, info={"config_type": "IsolatedAtom"})
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((1, 3)))
    return atoms


def number_of_frame(text: str, frame: int, column: int, value: str) -> str:
    """``text`` with one number of the first atom of a frame replaced."""
    lines = text.splitlines()
    line = 0
    for _ in range(frame):
        line += int(lines[line]) + 2
    words = lines[line + 2].split()
    words[column] = value
    lines[line + 2] = " ".join(words)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_forces_that_are_not_finite(read, folder, value):
    rewrite(folder / "train.xyz", lambda text: number_of_frame(text, 5, 5, value))
    with pytest.raises(InputError, match=rf"train.xyz, frame 5: forces of atom 0 has a value .*\({value}\)"):
        read()


def test_positions_and_energies_that_are_not_finite(read, folder):
    rewrite(folder / "valid.xyz", lambda text: number_of_frame(text, 2, 1, "nan"))
    with pytest.raises(InputError, match=r"valid.xyz, frame 2: positions of atom 0"):
        read()
    write_frames(folder / "valid.xyz", spring_frames(6, 2))
    rewrite(folder / "valid.xyz", lambda text: text.replace("energy=", "energy=nan other=", 1))
    with pytest.raises(InputError, match=r"valid.xyz, frame 0: energy has a value that is not finite \(nan\)"):
        read()


def test_labels_may_be_missing_and_a_stress_known_in_part(read, folder):
    frames = spring_frames(24, 1)
    frames[3].calc = SinglePointCalculator(frames[3], energy=-122.0)
    forces = frames[4].get_forces()
    frames[4].set_cell(np.eye(3) * 9.0)
    frames[4].pbc = True
    stress = np.array([0.1, np.nan, np.nan, 0.2, np.nan, 0.3])
    frames[4].calc = SinglePointCalculator(frames[4], energy=-88.0, forces=forces, stress=stress)
    write_frames(folder / "train.xyz", frames)
    arrays = read().train.arrays
    assert arrays.meta["n_labelled"] == {"energy": 24, "forces": 23, "stress": 1}
    assert np.isnan(arrays["stress"][4]).sum() == 4
    assert arrays["stress"][4][0, 1] == pytest.approx(0.3)
    rewrite(folder / "train.xyz", lambda text: text.replace("NaN", "inf").replace("nan", "inf"))
    with pytest.raises(InputError, match="frame 4: stress has an infinite component"):
        read()


def test_implausible_numbers_need_units_that_are_stated(read, folder):
    frames = spring_frames(24, 1)
    for atoms in frames:
        energy = atoms.get_potential_energy()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=60.0 * atoms.get_forces())
    write_frames(folder / "train.xyz", frames)
    said = r"train.xyz: the force RMS is .* is it in kcal/mol/Å"
    with pytest.raises(InputError, match=said + ".*; state data.units in the recipe"):
        read()
    with pytest.warns(UserWarning, match=said):
        read(units={"energy": "eV", "length": "Å"})


def test_duplicates_between_splits(read, folder, values):
    frames = spring_frames(24, 1)
    turned = frames[7].copy()
    turned.rotate(40, "x")
    turned.calc = SinglePointCalculator(turned, energy=frames[7].get_potential_energy(), forces=np.zeros((5, 3)))
    write_frames(folder / "valid.xyz", [*spring_frames(6, 2), turned, frames[2]])
    said = r"2 of 8 frames of data.valid are in the training set too: 6 \(training frame 7\), 7 \(training frame 2\)"
    with pytest.raises(InputError, match=said + "; remove them, or set data.duplicates to warn or allow"):
        read()
    with pytest.warns(UserWarning, match=said):
        read(duplicates="warn")
    read(duplicates="allow")
    read(n_train=1)  # frame 17 only
    write_frames(folder / "more.xyz", frames[:4])
    write_frames(folder / "few.xyz", spring_frames(5, 40))
    write_frames(folder / "a.xyz", spring_frames(1, 30))
    write_frames(folder / "b.xyz", [*spring_frames(4, 31), frames[3]])
    with pytest.raises(InputError, match=r"1 of 6 frames of data.test .*: 4 of b.xyz \(training frame 3 of more.xyz\)"):
        read(train=["few.xyz", "more.xyz"], valid="a.xyz", test=["a.xyz", "b.xyz"])


def test_a_test_frame_in_the_validation_set_is_warned_of(read, folder):
    write_frames(folder / "again.xyz", [*spring_frames(3, 30), spring_frames(6, 2)[4]])
    said = r"1 of 4 frames of data.test are in the validation set too: 3 \(validation frame 4\)"
    with pytest.warns(UserWarning, match=said):
        read(test="again.xyz")
    read(test="again.xyz", duplicates="allow")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"isolated_atom_energies": {"H": 0.0, "C": 0.0}}, r"train.xyz has O, .* \(first in frame 0\); given are H, C"),
        ({"valid": "nothing.xyz"}, "nothing.xyz: no such file"),
        ({"valid": "empty.xyz"}, "empty.xyz holds no frames"),
        ({"valid": "atoms.xyz"}, "atoms.xyz holds no frames but isolated atoms"),
        (
            {"valid": "gold.xyz", "isolated_atom_energies": None},
            r"data.valid has Au \(first in frame 1\), which no train",
        ),
        ({"n_train": 99}, "n_train is 99; the file has 24 frames"),
        ({"units": {"energi": "eV"}}, r"unknown key 'data.units.energi'; did you mean 'energy'"),
        ({"keys": {"stress_sign": 2}}, r"data.keys.stress_sign is 2"),
        ({"keys": {"voigt": "vaps"}}, r"data.keys.voigt is 'vaps'"),
        ({"keys": {"finite": "no"}}, r"unknown key 'data.keys.finite'"),
        ({"units": {"energy": "eVs"}}, "unknown unit of energy: 'eVs'"),
        ({"test": "bare.xyz"}, "bare.xyz has neither energies nor forces"),
    ],
)
def test_what_cannot_be_trained_on(read, folder, change, says):
    (folder / "empty.xyz").write_text("")
    write_frames(folder / "atoms.xyz", [isolated("H", -1.0)])
    write_frames(folder / "bare.xyz", [Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])])
    gold = Atoms("AuH", [[0, 0, 0], [0, 0, 1.6]])
    gold.calc = SinglePointCalculator(gold, energy=-50.0)
    write_frames(folder / "gold.xyz", [*spring_frames(1, 9), gold])
    with pytest.raises(InputError, match=says) as caught:
        read(**change)
    assert "\n" not in str(caught.value)


def test_isolated_atom_energies_are_fitted_where_none_are_given(read, folder, values):
    data = read(isolated_atom_energies=None)
    assert set(data.atoms.origin.values()) == {"least squares"}
    # Springs raise energies a little above the sum of the atoms'.
    assert data.atoms.energies == pytest.approx({1: E0["H"], 6: E0["C"], 8: E0["O"]}, abs=0.5)
    assert "fitted by least squares: H -" in data.summary()[2]
    write_frames(folder / "train.xyz", [isolated("O", -99.0), *spring_frames(24, 1), isolated("H", -9.0)])
    data = read(isolated_atom_energies=None)
    assert len(data.train) == 24
    assert data.atoms.energies[8] == -99.0
    assert data.atoms.energies[1] == -9.0
    assert data.header()["isolated_atom_energies_from"] == {
        "H": "isolated atoms",
        "O": "isolated atoms",
        "C": "least squares",
    }
    few = read(isolated_atom_energies=None, n_train=4)
    assert few.atoms.energies[8] == -99.0  # whether they were drawn or not
    given = read()
    assert given.atoms.energies[8] == E0["O"]
    write_frames(folder / "train.xyz", [isolated("O", -99.0), *spring_frames(24, 1), isolated("O", -9.0)])
    with pytest.raises(
        InputError, match=r"frame 25 says that an isolated O has -9\.0.*; accepted is one energy for each"
    ):
        read(isolated_atom_energies=None)
    assert read().atoms.energies[8] == E0["O"]


def test_one_composition_is_said_to_tell_nothing(read, folder):
    write_frames(folder / "train.xyz", spring_frames(6, 1, names=("CH3OH",)))
    write_frames(folder / "valid.xyz", spring_frames(6, 2, names=("CH3OH",)))
    data = read(isolated_atom_energies=None)
    assert any("only sums mean something" in line for line in data.summary())
    total = data.atoms.energies[6] + data.atoms.energies[8] + 4 * data.atoms.energies[1]
    assert total == pytest.approx(E0["C"] + E0["O"] + 4 * E0["H"], abs=0.5)


def test_several_files_are_one_set(read, folder):
    frames = read_list(folder / "train.xyz")
    write_frames(folder / "b.xyz", frames[:10])
    write_frames(folder / "c.xyz", frames[10:])
    one, several = read(), read(train=["b.xyz", "c.xyz"])
    assert len(one.train) == len(several.train) == 24
    for name in ("positions", "forces", "energy", "edges", "index"):
        np.testing.assert_array_equal(one.train.arrays[name], several.train.arrays[name])
    assert set(several.sha256) == {"b.xyz", "c.xyz", "valid.xyz"}


def stored(path, frames) -> None:
    """The frames in kcal/mol and Å, in the format that the name says."""
    numbers, positions = frames[0].numbers, np.array([atoms.positions for atoms in frames])
    energies = np.array([atoms.get_potential_energy() for atoms in frames]) / KCAL_PER_MOL
    forces = np.array([atoms.get_forces() for atoms in frames]) / KCAL_PER_MOL
    if path.suffix == ".npz":
        np.savez_compressed(path, z=numbers, R=positions, E=energies[:, None], F=forces)
        return
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            group = file.create_group("methanol")
            group["atomic_numbers"], group["conformations"] = numbers, positions
            group["energies"], group["gradients"] = energies, -forces
        return
    scaled = []
    for k in range(len(frames)):
        scaled.append(Atoms(numbers, positions[k]))
        scaled[k].calc = SinglePointCalculator(scaled[k], energy=energies[k], forces=forces[k])
    if path.suffix == ".xyz":
        write_frames(path, scaled)
        return
    if path.suffix == ".aselmdb":
        from ase_db_backends.aselmdb import LMDBDatabase

        database = LMDBDatabase(path)
    else:
        database = connect(path)
    with database as opened:
        for atoms in scaled:
            opened.write(atoms)


@pytest.mark.parametrize("suffix", [".xyz", ".db", ".npz", ".h5", pytest.param(".aselmdb", marks=pytest.mark.extra)])
def test_every_format_gives_the_same_set(read, folder, suffix):
    frames = spring_frames(8, 1, names=("CH3OH",))
    write_frames(folder / "ours.xyz", frames)
    stored(folder / f"theirs{suffix}", frames)
    write_frames(folder / "valid.xyz", spring_frames(4, 2, names=("CH3OH",)))
    ours = read(train="ours.xyz", n_train=5).train.arrays
    stored(folder / f"valid{suffix}", spring_frames(4, 2, names=("CH3OH",)))
    units = {"energy": "kcal/mol", "length": "Å"}
    theirs = read(train=f"theirs{suffix}", valid=f"valid{suffix}", n_train=5, units=units).train.arrays
    for name in ("numbers", "edges", "shifts", "n_atoms", "index"):
        np.testing.assert_array_equal(theirs[name], ours[name])
    for name in ("positions", "energy", "forces"):
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-6)  # decimals of extxyz


def test_training_from_the_cache_is_training_from_memory(folder, values, tmp_path_factory, monkeypatch):
    from test_loop import assert_same_run

    values["data"]["isolated_atom_energies"] = None
    train(make_recipe(values, folder), folder / "memory", progress=False)
    kept = tmp_path_factory.mktemp("graphs")
    monkeypatch.setattr(cache, "graphs_folder", lambda: kept)
    monkeypatch.setattr(arrays_module, "IN_MEMORY", 0)
    train(make_recipe(values, folder), folder / "built", progress=False)
    train(make_recipe(values, folder), folder / "mapped", progress=False)
    assert_same_run(folder / "memory", folder / "built")
    assert_same_run(folder / "memory", folder / "mapped")
    entries = sorted(path for path in kept.iterdir() if path.is_dir())
    assert len(entries) == 2
    assert {path.stem.split("-")[0] for path in kept.glob("*/*.json")} == {
        "duplicates",
        "isolated",
        "meta",
        "statistics",
    }
    _, header = load_checkpoint(folder / "mapped" / "model.safetensors")
    assert header["isolated_atom_energies_from"] == dict.fromkeys("HCO", "least squares")
    assert header["recipe"]["data"]["isolated_atom_energies"]["H"] == pytest.approx(E0["H"], abs=0.5)


def test_a_training_says_what_it_trains_on(folder, values, capsys):
    values["data"]["isolated_atom_energies"] = None
    train(make_recipe(values, folder), folder / "run")
    said = capsys.readouterr().err
    assert "tiny: 24 training, 6 validation frames; RMS force" in said
    assert "isolated-atom energies fitted by least squares" in said


def charged(n: int, seed: int, **info) -> list[Atoms]:
    frames = spring_frames(n, seed)
    for atoms in frames:
        atoms.info.update(info)
    return frames


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_frames_whose_charge_is_not_the_recipes(read, folder, kept_small, split):
    frames = charged(24, 1)
    frames[7].info["dft_total_charge"] = 1
    write_frames(folder / f"{split}.xyz", frames)
    if split != "train":
        write_frames(folder / "train.xyz", spring_frames(24, 9))
    said = rf"{split}.xyz, frame 7: total charge is 1 e \(dft_total_charge\), data.charge of the recipe is 0"
    for _ in range(2):  # read, and from the cache
        with pytest.raises(InputError, match=said):
            read(test="test.xyz")
    read(test="test.xyz", charge=1)  # the same entry of the cache, another charge


def test_multiplicities_and_several_files(read, folder, kept_small):
    write_frames(folder / "a.xyz", charged(5, 1))
    write_frames(folder / "b.xyz", charged(5, 9, REF_multiplicity=3))
    with pytest.raises(InputError, match=r"b.xyz, frame 0: spin multiplicity is 3 .*, data.multiplicity .* is 1"):
        read(train=["a.xyz", "b.xyz"])
    read(train=["a.xyz", "b.xyz"], multiplicity=3)
    write_frames(folder / "a.xyz", charged(5, 1, spin_multiplicity=1))
    with pytest.raises(InputError, match=r"a.xyz, frame 0 has spin multiplicity 1 .*, b.xyz, frame 0 has 3"):
        read(train=["a.xyz", "b.xyz"], multiplicity=3)


def test_isolated_atoms_are_open_shell_by_nature(read, folder):
    atom = isolated("O", E0["O"])
    atom.info |= {"spin": 3, "charge": 0}
    write_frames(folder / "train.xyz", [*spring_frames(24, 1), atom])
    read()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda energy: energy / HARTREE, "the isolated-atom energies look like Hartree"),
        (lambda energy: energy / 2, "different levels of theory, or all electrons against pseudopotentials"),
    ],
)
def test_isolated_atom_energies_of_another_unit_or_level(read, change, says):
    table = {symbol: change(energy) for symbol, energy in E0.items()}
    with pytest.raises(UserWarning, match=rf"mean of -29\.\d+ eV/atom.* {sum_of(table)} eV/atom.*{says}"):
        read(isolated_atom_energies=table)
    read(isolated_atom_energies=None)
    table = {symbol: 10 * energy for symbol, energy in E0.items()}
    with pytest.raises(
        InputError, match=r"eV/atom are left for the bonds, where -12 to 1 is possible; .*leave data.is"
    ):
        read(isolated_atom_energies=table)


def sum_of(table: dict[str, float]) -> str:
    """Mean of the isolated atoms' energies in eV per atom, over the three molecules."""
    per_molecule = ("H2O", "CH4", "CH3OH")
    counts = [Atoms(name).symbols.formula.count() for name in per_molecule]
    means = [sum(n * table[symbol] for symbol, n in one.items()) / sum(one.values()) for one in counts]
    return f"{np.mean(means):.4g}".replace(".", r"\.")


def test_atomisation_energies_with_full_energies_of_atoms(read, folder):
    for name, n, seed in (("train", 24, 1), ("valid", 6, 2)):
        frames = spring_frames(n, seed)
        for atoms in frames:
            whole = sum(E0[symbol] for symbol in atoms.get_chemical_symbols())
            results = {"energy": atoms.get_potential_energy() - whole - 4.0 * len(atoms), "forces": atoms.get_forces()}
            atoms.calc = SinglePointCalculator(atoms, **results)
        write_frames(folder / f"{name}.xyz", frames)
    with pytest.raises(InputError, match="the labels look like atomisation energies, with isolated atoms at 0 eV"):
        read()
    read(isolated_atom_energies=dict.fromkeys(E0, 0.0))


def test_labels_that_nobody_finds_are_told(read, folder):
    rewrite(folder / "train.xyz", lambda text: text.replace("forces:R:3", "pbe_forces:R:3", 20))
    with pytest.warns(UserWarning, match=r"train.xyz: 20 of 24 frames have an array 'pbe_forces' .* that is not read"):
        data = read()
    assert data.summary()[1].startswith("labels of training frames: energy in all, forces in 4, stress in none; of val")


def test_the_name_of_a_label_that_no_frame_has(read):
    with pytest.raises(InputError, match="train.xyz: no frame has 'REF_enregy', the key of energy"):
        read(keys={"energy": "REF_enregy"})


def test_predictions_of_a_potential_are_no_labels(read, folder, kept_small):
    """Whether they are read for the first time or come from the cache; who wants to distil a potential says so."""
    frames = read_list(folder / "train.xyz")
    mark(frames[3], "a potential of its own")
    write_frames(folder / "train.xyz", frames)
    for _ in range(2):
        with pytest.raises(InputError, match=r"train.xyz, frame 3: energy and forces are predictions \(a potential of"):
            read()
    assert len(read(accept_predictions=True).train) == len(frames)


def test_levels_of_theory_that_frames_state(read, folder):
    frames = read_list(folder / "train.xyz")
    for k, atoms in enumerate(frames):
        atoms.info["level_of_theory"] = "PBE/def2-SVP" if k else "B3LYP"
    write_frames(folder / "train.xyz", frames)
    with pytest.warns(UserWarning, match="train.xyz, frame 1: labelled by PBE/def2-SVP, others of the set by B3LYP"):
        read()
    with pytest.raises(
        InputError, match="train.xyz, frame 0: labelled by B3LYP, as 1 frames say, but data.reference is"
    ):
        read(reference="PBE")
    for atoms in frames:
        atoms.info["level_of_theory"] = "pbe"
    write_frames(folder / "train.xyz", frames)
    read(reference="PBE-D3")
