"""Comment lines and columns that are broken: one line with file and frame, whatever is in them."""

import os
import re

import numpy as np
import pytest

from equimd.errors import InputError
from equimd.frames import extxyz as extxyz_module
from equimd.frames import labels_of, read_frames, read_list

WHOLE = (
    '2\nLattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3:move_mask:L:1:forces:R:3:tags:I:1 energy=-31.0'
    ' stress=".1 .2 .3 .4 .5 .6" dipole="0 0 1" pbc="T T F" name=\'a b\' more="_JSON {\\"a\\": 1}"\n'
    "H 0 0 0 T 0 0 0.5 1\nH 0 0 0.74 F 0 0 -0.5 2\n"
)


def refusal(path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_list(path)
    assert "\n" not in str(refused.value)
    assert f"{path}, frame 0" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('stress=".1 .2 .3 .4 .5 .6"', 'stress=".1 .2 .3 .4 .5"', r"stress has shape \(5,\)"),
        ('stress=".1 .2 .3 .4 .5 .6"', 'stress="n/a"', "stress is 'n/a'; accepted: numbers"),
        ('stress=".1 .2 .3 .4 .5 .6"', "stress=[[1,2,3],[4,5]]", "rows of unequal lengths"),
        ('stress=".1 .2 .3 .4 .5 .6"', "stress", "stress has shape"),
        ('"0 0 1"', "n/a", "dipole is 'n/a'; accepted: numbers, or no dipole"),
        ('"0 0 1"', '"1 2"', r"dipole has shape \(2,\)"),
        ("5 0 0 0 5 0 0 0 5", "5 0 0 0 5 0", "Lattice is '5 0 0 0 5 0'; accepted: nine numbers"),
        ("5 0 0 0 5 0 0 0 5", "5 0 0 0 5 0 0 0 x", "Lattice is .*; accepted: nine numbers"),
        ('"5 0 0 0 5 0 0 0 5"', "[[5,0],[0,5]]", "accepted: nine numbers"),
        ('"T T F"', '"T T"', "pbc is 'T T'; accepted"),
        ('"T T F"', "xy", "pbc is 'xy'; accepted"),
        ('"T T F"', '"2 0 0"', "pbc is '2 0 0'; accepted"),
        ("-31.0", '"-31 eV"', "energy is '-31 eV'; accepted: numbers"),
        ("-31.0", "_JSON{", "not closed"),
        ("more=", 'more="_JSON [1" other=', "JSON that cannot be read"),
        ("name='a b'", "name='a b", "not closed"),
        ("species:S:1", "species:S:0", "Properties is"),
        ("forces:R:3", "pos:R:3", "names 'pos' twice"),
        ("forces:R:3", "positions:R:3", "two columns for positions"),
        ("move_mask:L:1", "move_mask:S:1", "move_mask is not"),
        ("H 0 0 0 T", "H 0 0 0 yes", "'yes' is neither true nor false"),
        ("tags:I:1", "masses:S:1", "column 'masses' is"),
        ("forces:R:3", "masses:R:3", "column 'masses' is"),
        ("H 0 0 0 T", "² 0 0 0 T", "species '²' is no element"),
        ("0.5 1\nH", "0.5 1 8\n", "atom 0 has 10 columns; accepted: 9"),
        ("2\n", "2_0\n", "number of atoms is '2_0'"),
        ("2\n", "9" * 18 + "\n", "the file ends within it"),
        ("2\n", "2" * 5000 + "\n", "number of atoms is"),
        ("Lattice", 'LATTICE="6 0 0 0 6 0 0 0 6" Lattice', "'LATTICE' and 'Lattice' differ"),
        ("energy=", "energy=-5 energy=", "'energy' is given twice"),
        ("energy=", "Energy=-5 energy=", "'Energy' and 'energy' differ"),
        ("tags:I:1", "Forces:R:1", "'forces' and 'Forces' differ"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, old, new, message):
    assert WHOLE.count(old) >= 1
    path = tmp_path / "a.xyz"
    path.write_text(WHOLE)
    assert len(read_list(path)) == 1
    text = refusal(path, WHOLE.replace(old, new, 1))

    assert re.search(message, text), text


def test_no_mutation_of_a_frame_ends_in_anything_but_frames_or_a_refusal(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.xyz"
    pieces = list("\"'{}\\=,: \t\n\0é") + [
        "[",
        "]]",
        "nan",
        "inf",
        "-1",
        "1e999",
        "T",
        "_JSON ",
        "_JSON {",
        "9" * 25,
        "",
    ]
    pieces += ["Lattice=", "pbc=", "Properties=", "stress=", "energy=", "dipole=", "energies=", "[[1,2],[3]]", "1_0"]
    pieces += ["masses:R:1:", "Z:I:1:", "S:3", "9" * 25, "momenta:R:3", "charge:R:1"]
    refused = []
    for _ in range(400):
        text = WHOLE
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(text)))
            stop = start + int(rng.choice([0, 0, 1, 2, 8]))
            text = text[:start] + pieces[rng.integers(len(pieces))] + text[stop:]
        path.write_text(text)
        try:
            for _, atoms in read_frames(path).select(lambda index, n_atoms: True):
                labels_of(atoms)
        except InputError as error:
            refused.append(str(error))
    assert 150 < len(refused) < 400
    assert all(str(path) in message and "\n" not in message and len(message) < 1000 for message in refused)


@pytest.mark.parametrize("name", ["zero.xyz", "fifo.xyz", "fifo.traj"])
def test_devices_and_pipes_are_refused(tmp_path, name):
    path = tmp_path / name
    if name.startswith("zero"):
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    with pytest.raises(InputError, match="is a device, a pipe or a socket; accepted: a regular file"):
        read_frames(path)


@pytest.mark.parametrize("name", [".", "..", "/", ""])
def test_folders_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is a folder without .aselmdb files"):
        read_frames(name)


def test_lines_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(extxyz_module, "_LONGEST_LINE", 1000)
    monkeypatch.setattr(extxyz_module, "_LONGEST_COMMENT", 2000)
    path = tmp_path / "a.xyz"
    assert "number of atoms is" in refusal(path, "\0" * 10_000)
    assert "comment line has 2000 characters or more" in refusal(path, "1\n" + "x" * 10_000)
    assert "line of atom 0 has 1000 characters or more" in refusal(path, "1\n\nH 0 0 0" + " " * 10_000)
    with pytest.raises(InputError, match="line of atom 0"):
        len(read_frames(path))


@pytest.mark.parametrize("stride", [0, -1, 2.5, "2"])
def test_strides_that_are_none(tmp_path, stride):
    (tmp_path / "a.xyz").write_text(WHOLE)
    with pytest.raises(InputError, match="stride is"):
        read_frames(tmp_path / "a.xyz", stride=stride)
    assert len(list(read_frames(tmp_path / "a.xyz", stride=10**30))) == 1
