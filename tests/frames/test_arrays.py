"""Packed frames: in memory and in files alike; and the duplicates that fingerprints find, and do not find."""

import errno
import os

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames.arrays import FIELDS, FORMAT_VERSION, open_arrays
from equimd.frames.compositions import fit_atomic_energies
from equimd.frames.fingerprints import TOLERANCE, duplicates_between, duplicates_within
from equimd.frames.packing import FRAMES_PER_CHUNK, Packer
from equimd.rotations import random_rotations


def with_energy(atoms: Atoms, energy: float) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.full((len(atoms), 3), 0.5))
    return atoms


def ethanols(n: int, seed: int = 0) -> list[Atoms]:
    frames = []
    for k in range(n):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.05, seed=1000 * seed + k)
        frames.append(with_energy(atoms, -300.0 - k))
    return frames


def crystals(n: int, seed: int = 0) -> list[Atoms]:
    frames = []
    for k in range(n):
        atoms = bulk("NaCl", "rocksalt", a=5.6) * (2, 1, 1)
        atoms.rattle(0.05, seed=1000 * seed + k)
        frames.append(with_energy(atoms, -50.0))
    return frames


def packed(frames, folder=None, cutoff=4.0):
    limit = 1 << 60 if folder is None else 0
    with Packer(cutoff, lambda: folder, limit) as packer:
        packer.add_file(enumerate(frames), "a.xyz")
        return packer.finish()


def test_files_hold_what_memory_holds(tmp_path):
    frames = ethanols(FRAMES_PER_CHUNK + 3) + crystals(2)
    memory, files = packed(frames), packed(frames, tmp_path)
    assert files.folder == tmp_path
    assert memory.folder is None
    assert memory.meta["species"] == files.meta["species"] == [1, 6, 8, 11, 17]
    for name in FIELDS:
        assert files[name].dtype == memory[name].dtype
        np.testing.assert_array_equal(files[name], memory[name])
    np.testing.assert_array_equal(files.edge_start, memory.edge_start)
    frame = files.frame(FRAMES_PER_CHUNK + 3)
    np.testing.assert_array_equal(frame["positions"], frames[-2].positions)
    with pytest.raises(ValueError, match="read-only"):
        files["energy"][0] = 7.0


def test_chunks_of_large_frames_are_short(monkeypatch):
    from equimd.frames import arrays as module
    from equimd.frames import packing

    sizes, original = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda frames, *rest: sizes.append(len(frames)) or original(frames, *rest))
    monkeypatch.setattr(packing, "ATOMS_PER_CHUNK", 18)
    arrays = packed(ethanols(5))
    assert sizes == [2, 2, 1]
    each = 9 + int(arrays["n_edges"][0])
    for limit, expected in ((2 * each + 5, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(module, "_NUMBERS_PER_CHUNK", limit)
        chunks = list(arrays.chunks())
        assert [frames.stop - frames.start for frames, _, _ in chunks] == expected
        assert [len(arrays["edges"][edges]) for _, _, edges in chunks] == [
            int(arrays["n_edges"][frames].sum()) for frames, _, _ in chunks
        ]
    assert [frames.stop - frames.start for frames, _, _ in arrays.chunks(3)] == [1] * 5


def test_integers_grow_with_what_they_hold(tmp_path):
    many = Atoms("H40000", positions=np.arange(40000)[:, None] * [1.5, 0.0, 0.0])
    frames = [*ethanols(FRAMES_PER_CHUNK), many]
    files = packed(frames, tmp_path, cutoff=2.0)
    assert files["edges"].dtype == np.int32
    assert files.frame(len(frames) - 1)["edges"].max() == 39999
    small = packed(frames[:-1], cutoff=2.0)
    assert small["edges"].dtype == np.int16
    np.testing.assert_array_equal(files["edges"][: len(small["edges"])], small["edges"])


@pytest.mark.parametrize("damage", ["truncated", "missing", "no meta", "other format"])
def test_what_is_not_whole_is_not_opened(tmp_path, damage):
    packed(ethanols(5), tmp_path)
    assert open_arrays(tmp_path) is not None
    if damage == "truncated":
        with open(tmp_path / "forces.bin", "r+b") as file:
            file.truncate(100)
    elif damage == "missing":
        (tmp_path / "cell.bin").unlink()
    elif damage == "no meta":
        (tmp_path / "meta.json").write_text("{")
    else:
        text = (tmp_path / "meta.json").read_text()
        (tmp_path / "meta.json").write_text(text.replace(f'"format": {FORMAT_VERSION}', '"format": 0'))
    assert open_arrays(tmp_path) is None


def test_limits_are_no_sign_of_missing_files(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    packed(ethanols(2), tmp_path)
    monkeypatch.setattr(np, "memmap", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        open_arrays(tmp_path)


def test_isolated_atoms_are_set_aside():
    atom = with_energy(Atoms("O"), -100.0)
    atom.info["config_type"] = "isolated_atom"
    other = with_energy(Atoms("H"), -10.0)  # says nothing of itself: a frame like others
    arrays = packed([atom, *ethanols(2), other])
    assert arrays.meta["isolated_atoms"] == {"8": -100.0}
    assert arrays["index"].tolist() == [1, 2, 3]


def test_bad_frames_are_named():
    frames = ethanols(3)
    frames[2].positions[4, 1] = np.nan
    with pytest.raises(InputError, match=r"a.xyz, frame 2: positions of atom 4"):
        packed(frames)


@pytest.mark.parametrize("number", [0, -1, 119, 300])
def test_what_is_no_element_is_refused(number):
    frames = ethanols(3)
    frames[1].numbers[4] = number
    with pytest.raises(InputError, match=f"a.xyz, frame 1: atomic number {number} is no element; accepted: 1 to 118"):
        packed(frames)


def moved(frames: list[Atoms], seed: int) -> list[Atoms]:
    """Rotated, reflected, shifted copies with another order of atoms and rounded positions."""
    rng = np.random.default_rng(seed)
    out = []
    for atoms, rotation in zip(frames, random_rotations(len(frames), seed, True).rotations, strict=True):
        copy = atoms[rng.permutation(len(atoms))]
        copy.set_cell(copy.cell.array @ rotation.T)
        copy.positions = np.round(copy.positions @ rotation.T + rng.normal(size=3), 4)
        copy.wrap() if copy.pbc.any() else None
        out.append(copy)
    return out


@pytest.mark.parametrize("make", [ethanols, crystals])
def test_duplicates_are_found_however_they_were_moved(make):
    known = make(40)
    others = make(10, seed=1)
    copies = moved(known[5:8], 0)
    a, b = packed(known), packed([*others[:4], *copies, *others[4:]])
    assert duplicates_between(a, b) == [(4, 5), (5, 6), (6, 7)]
    assert duplicates_within(b) == []
    assert duplicates_within(packed([*known, *copies, *copies])) == [
        (40, 5),
        (41, 6),
        (42, 7),
        (43, 5),
        (44, 6),
        (45, 7),
    ]


@pytest.mark.parametrize("make", [ethanols, crystals])
def test_what_differs_by_more_than_rounding_is_no_duplicate(make):
    known = make(40)
    others = moved(known, 0)
    for atoms in others:
        atoms.positions[0, 0] += 30 * TOLERANCE
    assert duplicates_between(packed(known), packed(others)) == []
    gold = [atoms.copy() for atoms in known]
    for atoms in gold:
        atoms.numbers[0] = 79
    assert duplicates_between(packed(known), packed(gold)) == []


def dimer(symbols: str, distance: float) -> Atoms:
    return Atoms(symbols, [[0.0, 0.0, 0.0], [distance, 0.0, 0.0]], cell=[30.0] * 3, pbc=True)


def test_frames_without_neighbours_are_no_duplicates_of_each_other():
    arrays = packed([dimer("ArAr", 6.0), dimer("ArAr", 8.0), dimer("ArKr", 8.0)], cutoff=4.0)
    assert duplicates_within(arrays) == []
    near = packed([dimer("ArAr", 3.0), dimer("ArAr", 3.0)], cutoff=4.0)
    assert duplicates_within(near) == [(1, 0)]


def test_how_far_apart_two_molecules_are_in_a_cell_counts():
    """Beyond the cutoff no edge tells; nearest images do, across the border of the cell too."""

    def pair(distance, shift=0.0):
        atoms = molecule("H2", cell=[30.0] * 3, pbc=True)
        other = atoms.copy()
        other.translate([distance, 0, 0])
        atoms += other
        atoms.translate([shift, 0, 0])
        atoms.wrap()
        return atoms

    frames = [pair(6.0), pair(8.0), pair(11.0), pair(8.0, shift=25.0)]
    assert duplicates_within(packed(frames)) == [(3, 1)]


@pytest.mark.parametrize(
    ("energies", "says"),
    [
        (
            (-13.0, -13.1),
            ["a.xyz: frame 2 says that an isolated H has -13.100000 eV, another that it has -13.000000 eV"],
        ),
        ((-13.0, -13.00001), []),
    ],
)
def test_isolated_atoms_of_one_element_with_several_energies_are_told(energies, says):
    atoms = [with_energy(Atoms("H", info={"config_type": "IsolatedAtom"}), energy) for energy in energies]
    meta = packed([*ethanols(1), *atoms]).meta
    assert meta["isolated_atoms"] == {"1": energies[0]}
    assert meta["contradictions"] == says


def test_elements_beyond_the_cutoff_count():
    frames = [dimer("ArAr", 3.0) + Atoms(symbol, [[15.0] * 3]) for symbol in ("Ar", "Kr")]
    assert duplicates_within(packed(frames, cutoff=4.0)) == []


def test_many_copies_of_one_frame_are_one_group():
    frames = ethanols(3)
    arrays = packed([frames[0]] * 5 + frames[1:])
    assert duplicates_within(arrays) == [(1, 0), (2, 0), (3, 0), (4, 0)]


def test_fitted_atomic_energies():
    frames = [with_energy(molecule(name), 0.0) for name in ("H2O", "CH4", "CH3OH", "H2", "CO")]
    true = {1: -13.0, 6: -1000.0, 8: -2000.0}
    for atoms in frames:
        with_energy(atoms, sum(true[z] for z in atoms.numbers))
    arrays = packed(frames)
    known = dict.fromkeys(true, 0.0)
    fit = fit_atomic_energies(arrays, known, [1, 6, 8])
    assert fit.energies == pytest.approx(true)
    assert fit.determined
    partly = fit_atomic_energies(arrays, {**known, 6: -1000.0}, [1, 8])
    assert partly.energies == pytest.approx({1: -13.0, 8: -2000.0})
    one = fit_atomic_energies(packed([frames[2]]), known, [1, 6, 8], by_charge=True)
    assert not one.determined
    assert 4 * one.energies[1] + one.energies[6] + one.energies[8] == pytest.approx(-3052.0)
    assert one.energies[8] < one.energies[6] < one.energies[1] < 0
