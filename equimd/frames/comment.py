"""The comment line of extended XYZ: `key=value` pairs as ASE reads and writes them.

Format: https://github.com/libAtoms/extxyz. A value is an integer, a float, T or F, an array of these in quotes or
brackets, text, or JSON after `_JSON`. Other than with ASE, an empty text is a value, rows in brackets are a matrix, and
a key that is given twice with different values is an error.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<equals>=)
    |"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>(?:[^'\\]|\\.)*)'|\{(?P<curly>(?:[^}\\]|\\.)*)\}
    |\[(?P<rows>\s*\[(?:[^\[\]]|\]\s*,?\s*\[)*\]\s*,?\s*)\]|\[(?P<square>(?:[^\]\\]|\\.)*)\]
    |(?P<plain>(?:[^\s="'{\[\\]|\\.?)+)|(?P<open>.)""",
    re.VERBOSE | re.DOTALL,
)
_WORD = re.compile(r"[^\s,]+")
_BOOLEANS = {"T": True, "true": True, "True": True, "TRUE": True}
_BOOLEANS |= {"F": False, "false": False, "False": False, "FALSE": False}
_PERIODIC = {"t": True, "true": True, ".true.": True, "1": True}
_PERIODIC |= {"f": False, "false": False, ".false.": False, "0": False}
_MATRICES = ("virial", "stress")
_JSON = "_JSON "
_SPECIAL = re.compile(r"[\s\"'{}\[\]\\]")


@dataclass
class Text:
    """A value as it stands in the line, without its quotes; `rows` if it is a matrix in brackets."""

    text: str
    rows: bool = False


def split(line: str) -> dict[str, Text]:
    """The pairs of a comment line in their order; a key alone has the value T.

    Raises:
        ValueError: if a quote or bracket is not closed, a value has no key, or a key is given twice and differently.
    """
    pairs: list[list[Text]] = []
    last = "space"
    for match in _TOKEN.finditer(line.strip()):
        kind = str(match.lastgroup)
        if kind == "open":
            raise ValueError(f"{match.group()} is not closed in {line.strip()[match.start() :][:40]!r}")
        if kind == "space":
            last = "equals" if last == "equals" else "space"
            continue
        if kind == "equals":
            if not pairs:
                raise ValueError("it begins with =")
            pairs[-1].append(Text(""))
        else:
            text = Text(re.sub(r"\\(.?)", r"\1", match.group(kind), flags=re.DOTALL), kind == "rows")
            if last == "space":
                pairs.append([text])
            else:  # parts of one word: ab"c d"
                pairs[-1][-1] = Text(pairs[-1][-1].text + text.text, text.rows)
        last = kind
    found: dict[str, Text] = {}
    bare: set[str] = set()
    for key, *parts in pairs:
        value = parts[0] if len(parts) == 1 else Text("=".join(part.text for part in parts) if parts else "T")
        known = found.get(key.text)
        if known is not None and parts and key.text not in bare and known != value:
            raise ValueError(f"{key.text!r} is given twice, as {known.text[:40]!r} and {value.text[:40]!r}")
        if known is None or parts:
            found[key.text] = value
            bare = bare - {key.text} if parts else bare | {key.text}
    return found


def value_of(key: str, text: Text) -> Any:
    """What a value means: integers before floats, booleans, JSON, text.

    Raises:
        ValueError: for JSON that is none, or rows of unequal lengths.
    """
    if text.rows:
        return _matrix(text.text)
    if key.lower() == "uid":
        return text.text
    words = _WORD.findall(text.text)
    number = _numbers(words)
    if number is not None:
        if key in _MATRICES and number.shape == (9,):
            return number.reshape((3, 3), order="F")
        return number[0] if len(number) == 1 else number
    if words and all(word in _BOOLEANS for word in words):
        return _BOOLEANS[words[0]] if len(words) == 1 else [_BOOLEANS[word] for word in words]
    if text.text.startswith(_JSON):
        return _from_json(key, text.text.removeprefix(_JSON))
    return text.text


def _numbers(words: list[str]) -> np.ndarray | None:
    if any("_" in word for word in words):  # Python reads 1_0 as ten
        return None
    for dtype, convert in ((np.int64, int), (np.float64, float)):
        try:
            return np.array([convert(word) for word in words], dtype=dtype)
        except (ValueError, OverflowError):
            continue
    return None


def _from_json(key: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{key!r} has JSON that cannot be read: {text[:40]!r}") from None
    try:
        array = np.array(value)
    except ValueError:  # of unequal lengths
        return value
    return array if array.dtype.kind in "ifb" and array.ndim else value


def _matrix(text: str) -> Any:
    rows = [_WORD.findall(row) for row in re.findall(r"\[([^\[\]]*)\]", text)]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"rows of unequal lengths in [{text[:40]}]")
    number = _numbers([word for row in rows for word in row])
    return rows if number is None else number.reshape(len(rows), -1)


def lattice_of(text: Text) -> np.ndarray:
    """Cell vectors (3, 3) in rows, of nine numbers or of three rows in brackets.

    Raises:
        ValueError: for anything else.
    """
    value = _matrix(text.text) if text.rows else _numbers(_WORD.findall(text.text))
    if not isinstance(value, np.ndarray) or value.shape not in ((9,), (3, 3)):
        raise ValueError(f"Lattice is {text.text[:60]!r}; accepted: nine numbers, three for each cell vector")
    return value.astype(np.float64).reshape(3, 3)


def pbc_of(text: Text) -> np.ndarray:
    """Periodic directions (3,) of `T T F`, `TTF`, `1 1 0`, `[true, true, false]`, or one word for all three.

    Raises:
        ValueError: for anything else.
    """
    words = [word.lower() for word in _WORD.findall(text.text)]
    if len(words) == 1 and re.fullmatch("[tf01]{3}", words[0]):
        words = list(words[0])
    if text.rows or len(words) not in (1, 3) or not all(word in _PERIODIC for word in words):
        raise ValueError(f'pbc is {text.text[:40]!r}; accepted: T or F for each direction, such as pbc="T T F"')
    return np.array([_PERIODIC[word] for word in words] * (3 // len(words)))


def format_pair(key: str, value: Any) -> str | None:
    """A pair that reads back as this value, here and in ASE; None for what has no text, such as functions."""
    text = _format_value(key, value)
    if text is None or not key or "\n" in key or "\r" in key:
        return None
    return f"{_quote(key, '=')}={_quote(text)}"


def _format_value(key: str, value: Any) -> str | None:
    if type(value).__name__ == "Spacegroup":
        value = value.symbol
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.generic) and value.dtype.kind in "biufU":
        value = value.item()
    if isinstance(value, str):
        return value if _stays_text(value) or (key.lower() == "uid" and value.split() == [value]) else _as_json(value)
    if isinstance(value, bool):
        return "T" if value else "F"
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
        return f"{value}"
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        if key in _MATRICES and value.size == 9:
            value = value.reshape(9, order="F")
        if value.ndim == 1 and value.size > 1:
            return " ".join("FT"[int(one)] if value.dtype.kind == "b" else f"{one}" for one in value)
    return _as_json(value)


def _stays_text(text: str) -> bool:
    """Whether this text is read as itself; ASE reads 1_0 as a number, and swallows what follows an empty text."""
    if text.startswith(_JSON) or "\n" in text or "\r" in text:
        return False
    words = _WORD.findall(text)
    if not words or all(word in _BOOLEANS for word in words):
        return False
    return _numbers([word.replace("_", "") for word in words]) is None


def _as_json(value: Any) -> str | None:
    try:
        return _JSON + json.dumps(_plain(value))
    except (TypeError, ValueError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):  # JSON would make them text
            raise TypeError
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _quote(text: str, special: str = "\n") -> str:
    if text and special not in text and not _SPECIAL.search(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
