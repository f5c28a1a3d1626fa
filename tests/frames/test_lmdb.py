"""fairchem's .aselmdb: rows as ase-db-backends writes them, shards, and that nothing is unpickled."""

import json
import pickle
import sys
import zlib

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames import UnitSpec, labels_of, read_frames, read_list

lmdb = pytest.importorskip("lmdb")


def labelled(k):
    atoms = bulk("Cu", cubic=True) if k % 2 else molecule("H2O")
    atoms.rattle(0.05, seed=k)
    rng = np.random.default_rng(k)
    results = {"energy": -float(k), "forces": rng.normal(size=(len(atoms), 3))}
    if k % 2:
        results["stress"] = rng.normal(size=6) * 1e-2
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def entry(value):
    return zlib.compress(json.dumps(value).encode())


def plain(path, rows, deleted=()):
    """Rows as plain JSON with lists, as other encoders than ASE's leave them."""
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as environment, environment.begin(write=True) as file:
        for k, atoms in enumerate(rows, 1):
            results = {name: np.asarray(value).tolist() for name, value in atoms.calc.results.items()}
            row = {"numbers": atoms.numbers.tolist(), "positions": atoms.positions.tolist(), "mtime": 0.0, "ctime": 0.0}
            row |= {"cell": atoms.cell.tolist(), "pbc": atoms.pbc.tolist(), "unique_id": str(k), "user": "x"}
            row |= {"calculator": "unknown", "calculator_parameters": {}, "data": {}, "key_value_pairs": {"k": k}}
            file.put(str(k).encode(), entry(row | results))
        file.put(b"nextid", entry(len(rows) + 1))
        if deleted:
            file.put(b"deleted_ids", entry(list(deleted)))
    return path


def assert_same(frames, expected):
    assert len(frames) == len(expected)
    for one, other in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.numbers, other.numbers)
        np.testing.assert_array_equal(one.pbc, other.pbc)
        for name, value in labels_of(other).items():
            if value is None:
                assert labels_of(one)[name] is None
            else:
                np.testing.assert_allclose(labels_of(one)[name], value, rtol=1e-15)


@pytest.mark.extra
def test_what_ase_db_backends_writes(tmp_path):
    import ase_db_backends.aselmdb as backend

    rows = [labelled(k) for k in range(4)]
    with backend.LMDBDatabase(tmp_path / "a.aselmdb") as database:
        for atoms in rows:
            database.write(atoms, data={"REF_energy": 5.0} if len(atoms) > 9 else None)
    frames = read_frames(tmp_path / "a.aselmdb")
    assert len(frames) == 4
    assert_same(list(frames), rows)
    kilojoules = read_list(tmp_path / "a.aselmdb", units=UnitSpec(energy="kJ/mol"))
    assert labels_of(kilojoules[3])["energy"] == pytest.approx(-0.0310928, abs=1e-6)


def test_plain_json_shards_and_deleted_rows(tmp_path):
    rows = [labelled(k) for k in range(5)]
    folder = tmp_path / "set"
    folder.mkdir()
    plain(folder / "data.0001.aselmdb", rows[3:])
    plain(folder / "data.0000.aselmdb", rows[:3], deleted=[2])
    frames = read_frames(folder)
    assert len(frames) == 4
    assert_same(list(frames), [rows[0], rows[2], rows[3], rows[4]])
    assert next(iter(frames)).info["k"] == 1


class Bomb:
    def __reduce__(self):
        return (print, ("exploded",))


def test_what_is_no_row_is_refused_and_never_unpickled(tmp_path, capsys):
    path = plain(tmp_path / "a.aselmdb", [labelled(0)])
    with lmdb.open(str(path), subdir=False) as environment, environment.begin(write=True) as file:
        file.put(b"1", pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="cannot be read"):
        read_list(path)
    with lmdb.open(str(path), subdir=False) as environment, environment.begin(write=True) as file:
        file.put(b"1", entry({"positions": [[0, 0, 0]]}))
    with pytest.raises(InputError, match="row 0: lacks"):
        read_list(path)
    (tmp_path / "b.aselmdb").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="cannot be read"):
        read_list(tmp_path / "b.aselmdb")
    assert "exploded" not in capsys.readouterr().out


def test_a_missing_package_is_one_line_of_advice(tmp_path, monkeypatch):
    path = plain(tmp_path / "a.aselmdb", [labelled(0)])
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match=r'needs the package lmdb: pip install "equimd\[lmdb\]"'):
        read_frames(path)
    with pytest.raises(InputError, match="is a folder without .aselmdb files"):
        read_frames(tmp_path.parent / tmp_path.name / "..")
