import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.data import chemical_symbols
from ase.io import read

from equimd.frames import read_list
from equimd.references import isolated_atom_energies, label

DATA = Path(__file__).resolve().parents[1] / "data"
SETS = sorted(path.parent.name for path in DATA.glob("*/info.json"))
SPLITS = ("train", "valid", "test", "hot")
MORE = {"alanine-dipeptide": ("early",)}
N_ATOMS = {"ethanol": 9, "alanine-dipeptide": 22, "water": 96}
MAX_TOTAL_MB, MAX_FILE_MB = 15, 5


def _info(name: str) -> dict:
    return json.loads((DATA / name / "info.json").read_text(encoding="utf-8"))


def _splits(name: str) -> tuple[str, ...]:
    return SPLITS + MORE.get(name, ())


def _frames(name: str, split: str) -> list[Atoms]:
    return read_list(DATA / name / f"{split}.xyz.gz")


def test_there_are_data_sets():
    assert set(SETS) == set(N_ATOMS)


def test_the_folder_is_small():
    sizes = [path.stat().st_size for path in DATA.rglob("*.xyz.gz")]
    assert sum(sizes) < MAX_TOTAL_MB * 1e6
    assert max(sizes) < MAX_FILE_MB * 1e6


@pytest.mark.parametrize("name", SETS)
def test_files_are_those_that_info_describes(name):
    info = _info(name)
    assert set(info["sha256"]) == {*(f"{split}.xyz.gz" for split in _splits(name)), "start.xyz"}
    readme = (DATA / name / "README.md").read_text(encoding="utf-8")
    for file, expected in info["sha256"].items():
        assert hashlib.sha256((DATA / name / file).read_bytes()).hexdigest() == expected, file
        assert expected in readme, f"{file}: README.md of {name} has another sha256"


@pytest.mark.parametrize("name", SETS)
def test_no_seed_is_used_twice(name):
    seeds = [seed for split in _info(name)["splits"].values() for seed in split["seeds"]]
    assert len(seeds) == len(set(seeds)) >= len(SPLITS)


@pytest.mark.parametrize("name", SETS)
def test_frames(name):
    seen: set[bytes] = set()
    rms = {}
    periodic = name == "water"
    for split in _splits(name):
        frames = _frames(name, split)
        assert len(frames) == _info(name)["splits"][split]["count"]
        for frame in frames:
            assert len(frame) == N_ATOMS[name]
            assert frame.pbc.all() if periodic else not frame.pbc.any()
            assert ("stress" in frame.calc.results) == periodic
            if not periodic:  # 8 decimals
                np.testing.assert_allclose(frame.get_center_of_mass(), 0, atol=2e-8)
        keys = {frame.positions.tobytes() for frame in frames}
        assert len(keys) == len(frames)
        assert not keys & seen, f"{split} shares a frame with another split"
        seen |= keys
        rms[split] = np.sqrt(np.mean([frame.get_forces() ** 2 for frame in frames]))
    # harmonic estimate for C-H bonds at 500 K: about 1 eV/Å
    assert 0.5 < rms["test"] < 2.5
    # two samples of one distribution (train of water has displaced atoms too), and one of a hotter one
    assert rms["train"] == pytest.approx(rms["test"], rel=0.5 if periodic else 0.05)
    assert rms["hot"] > 1.1 * rms["test"]


@pytest.mark.parametrize("name", SETS)
def test_orientations_of_molecules_are_spread(name):
    """No direction is preferred: forces have the same second moment along every axis."""
    moment = np.mean([frame.get_forces().T @ frame.get_forces() for frame in _frames(name, "train")], axis=0)
    # relative to the mean of the diagonal; trajectories last several rotational correlation times at most
    assert np.abs(moment / (np.trace(moment) / 3) - np.eye(3)).max() < 0.2


@pytest.mark.parametrize("name", SETS)
def test_labels_are_those_of_the_reference(name):
    pytest.importorskip("tblite")
    info = _info(name)
    index = slice(None, None, max(1, info["splits"]["test"]["count"] // 3))
    frames = _frames(name, "test")[index][: 1 if name == "water" else 3]
    for frame, again in zip(frames, label(frames, info["reference"]), strict=True):
        # 1e-8 Å in positions times 100 eV/Å², and the convergence of the self-consistent cycle
        np.testing.assert_allclose(frame.get_forces(), again.get_forces(), rtol=0, atol=1e-5)
        assert frame.get_potential_energy() == pytest.approx(again.get_potential_energy(), rel=0, abs=1e-5)
        if frame.pbc.all():
            np.testing.assert_allclose(frame.get_stress(), again.get_stress(), rtol=0, atol=1e-6)
    energies = isolated_atom_energies(info["reference"], frames[0].numbers)
    assert {chemical_symbols[number]: energy for number, energy in energies.items()} == pytest.approx(
        info["isolated_atom_energies"], rel=0, abs=1e-6
    )


@pytest.mark.parametrize("name", SETS)
def test_start_is_one_structure_of_the_same_atoms(name):
    start = read(DATA / name / "start.xyz")
    frame = _frames(name, "test")[0]
    np.testing.assert_array_equal(start.numbers, frame.numbers)
    np.testing.assert_array_equal(start.pbc, frame.pbc)


@pytest.mark.parametrize("split", ["valid", "test", "hot"])
def test_molecules_of_water_keep_their_distance(split):
    molecule = np.arange(96) // 3
    for frame in _frames("water", split):
        distances = frame.get_all_distances(mic=True)
        distances[molecule[:, None] == molecule] = np.inf
        for number, closest in ((1, 1.2), (8, 2.2)):
            chosen = frame.numbers == number
            assert distances[np.ix_(chosen, chosen)].min() > closest


def test_alanine_dipeptide_covers_both_sides_of_the_ramachandran_map():
    frames = _frames("alanine-dipeptide", "train")
    phi, psi = (4, 6, 8, 14), (6, 8, 14, 16)
    angles = np.array([(frame.get_dihedral(*phi), frame.get_dihedral(*psi)) for frame in frames])
    filled, _, _ = np.histogram2d(*angles.T, bins=12, range=[(0, 360), (0, 360)])
    assert (angles[:, 0] < 180).mean() > 0.15
    assert (angles[:, 0] > 180).mean() > 0.5
    # of 144 squares of 30°; about half of the map is sterically closed
    assert (filled > 0).sum() > 45
