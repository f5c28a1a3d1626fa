"""The comment line of extended XYZ beside ASE's parser, and values that read back as themselves."""

import json

import numpy as np
import pytest
from ase.io.extxyz import key_val_str_to_dict

from equimd.frames.comment import format_pair, lattice_of, pbc_of, split, value_of

VALUES = {
    "text": "hello world",
    "quotes": 'say "hi" it\'s',
    "digits": "007",
    "underscore": "1_0",
    "letter": "T",
    "not_a_number": "nan",
    "commas": "1,2",
    "empty": "",
    "marked": "_JSON 1",
    "lines": "a\nb\r\tc",
    "smiles": "F/C=C\\F",
    "brackets": "[1 2]",
    "equals": "a=b",
    "accents": "é ü",
    "uid": "0012",
    "integer": 3,
    "beyond_int64": 10**20,
    "float": 0.1,
    "numpy": np.float64(1e-300),
    "boolean": False,
    "none": None,
    "array": np.arange(4),
    "one": np.array([5]),
    "nothing": np.array([]),
    "matrix": np.arange(6.0).reshape(2, 3),
    "flags": np.array([True, False]),
    "names": ["a", "b"],
    "tuple": (1, 2),
    "tree": {"k": [1, 2], "z": {"y": "w", "array": np.arange(2)}},
    "stress": np.arange(9.0).reshape(3, 3),
    "key with = and space": 1,
}


def read(line: str) -> dict:
    return {key: value_of(key, text) for key, text in split(line).items()}


def same(read_back, value) -> bool:
    if isinstance(value, str | dict | None):
        plain = json.loads(json.dumps(value, default=np.ndarray.tolist))
        return type(read_back) is type(value) and read_back == plain
    return np.array_equal(np.asarray(read_back), np.asarray(value))


@pytest.mark.parametrize("key", VALUES)
def test_a_value_reads_back_as_itself_here_and_in_ase(key):
    line = f"before=1 {format_pair(key, VALUES[key])} after=2"
    for back in (read(line), key_val_str_to_dict(line)):
        assert set(back) == {"before", key, "after"}
        assert back["before"] == 1
        assert back["after"] == 2
        assert same(back[key], VALUES[key]), back[key]


@pytest.mark.parametrize("value", [print, object(), {1: 2}, 1j, {"a": {1, 2}}])
def test_what_has_no_text_is_not_written(value):
    assert format_pair("key", value) is None


LINES = [
    'a=1 b="1 2 3" c=T d="T F" e flag x={1 2} y=[1, 2] z=a"b c"d q=1.5e3 s="1 2 x"',
    " i =        0, time =        0.000, E =       -17.1643447508",
    'a==b b=c=d  e= f g=\'it is\' h="a \\" b"',
    'virial="1 2 3 4 5 6 7 8 9" uid=0012 n=nan t=TRUE f=[False, true] u=é',
    'j="_JSON {\\"a\\": [1, 2]}" k="_JSON [[1, 2], [3, 4]]" big=99999999999999999999',
]


@pytest.mark.parametrize("line", LINES)
def test_the_parser_agrees_with_ase(line):
    ours, theirs = read(line), key_val_str_to_dict(line)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert type(ours[key]) is type(value)
        np.testing.assert_array_equal(ours[key], value)


def test_an_empty_value_does_not_swallow_the_next_pair():
    assert read('note="" energy=5')["energy"] == 5


@pytest.mark.parametrize(
    "text",
    ["T T F", "TTF", "ttf", "T,T,F", "[T, T, F]", "1 1 0", "110", "[1,1,0]", "true true false", "True True False"],
)
def test_periodic_directions(text):
    quoted = text if text.startswith("[") else f'"{text}"'
    assert pbc_of(split(f"pbc={quoted}")["pbc"]).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("text", "periodic"), [("T", True), ("true", True), ("1", True), ("F", False), ("FFF", False), ("011", None)]
)
def test_periodic_directions_in_one_word(text, periodic):
    expected = [False, True, True] if periodic is None else [periodic] * 3
    assert pbc_of(split(f"pbc={text}")["pbc"]).tolist() == expected


@pytest.mark.parametrize("text", ['"1 2 3 4 5 6 7 8 9"', "[[1,2,3],[4,5,6],[7,8,9]]", "[ [1, 2, 3] [4 5 6] [7.0 8 9]]"])
def test_cell_vectors_are_rows(text):
    np.testing.assert_array_equal(lattice_of(split(f"Lattice={text}")["Lattice"]), np.arange(1.0, 10.0).reshape(3, 3))
