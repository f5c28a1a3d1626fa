"""What stands beside the weights, and its types: a checkpoint's header, an ensemble's members, a card.

A header is read by many rooms, as a plain dict; it is checked here, once. Unknown keys are kept: they are of whoever
wrote the file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from equimd.errors import InputError
from equimd.models.potential import MAX_ATOMIC_NUMBER
from equimd.results import MAX_DEPTH, check_plain, content_hash, explain, parse_json

CARD_FILE = "card.yaml"
_HASH = re.compile("[0-9a-fA-F]{64}")
_MAX_BYTES = {".yaml": 2**16, ".json": 2**20}  # YAML is slow to read, and cards are short

_Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Text for one line of a terminal."""


class _Part(BaseModel):
    """A part of a file; values are not converted."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Electrons(_Part):
    charge: float | None = None
    multiplicity: float | None = Field(default=None, ge=1)
    reference: _Text | None = None


class _Recipe(_Part):
    data: _Electrons | None = None


class _Ledger(_Part):
    hours: float | None = Field(default=None, ge=0)
    device_hours: float | None = Field(default=None, ge=0)
    steps: int | None = Field(default=None, ge=0)
    frames_seen: int | None = Field(default=None, ge=0)


class _Header(_Electrons):
    """Of a checkpoint. Energies of isolated atoms are in eV; heavier than any atom's they are not accepted."""

    family: _Text
    settings: dict[str, Any]
    species: list[Annotated[int, Field(ge=1, le=MAX_ATOMIC_NUMBER)]] = Field(min_length=1, max_length=MAX_ATOMIC_NUMBER)
    isolated_atom_energies: dict[
        Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,2}$")], Annotated[float, Field(ge=-1e8, le=1e8)]
    ]
    name: _Text | None = None
    package_version: _Text | None = None
    recipe: _Recipe | None = None
    ledger: _Ledger | None = None
    n_train: int | None = Field(default=None, ge=0)
    data_sha256: dict[str, str] | None = None
    ancestry: list[dict[str, Any]] | None = None
    errors: dict[str, Any] | None = None


class _Ensemble(_Part):
    """Of several potentials, in folders beside the file."""

    members: list[_Text]
    name: _Text | None = None
    device_hours: float | None = Field(default=None, ge=0)


class _Card(_Part):
    """Of a shipped potential."""

    name: _Text | None = None
    family: _Text | None = None
    reference: _Text | None = None
    elements: list[_Text] | None = None
    sha256: str | None = None
    training: dict[str, Any] | None = None
    test: dict[str, Any] | None = None


def check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse a header whose values are not of the types that its readers rely on.

    Raises:
        InputError: in one line, the first value that is not accepted.
    """
    missing = [name for name, field in _Header.model_fields.items() if field.is_required() and name not in header]
    if missing:
        raise InputError(f"{path} has no {missing[0]!r} in its header")
    _check(_Header, path, header, "header")
    if len(set(header["species"])) < len(header["species"]):
        raise InputError(f"{path} has a bad header: species are {header['species']}, one of them twice")
    if header["settings"].get("family") != header["family"]:
        raise InputError(f"{path} has a bad header: family is {header['family'][:60]!r}, which settings.family is not")


def read_ensemble(path: Path) -> dict[str, Any]:
    """What ``ensemble.json`` says; ``members`` are names of different folders beside it.

    Raises:
        InputError: for a file that is not readable, not of this form, or changed since it was written.
    """
    try:
        content = parse_json(_read_text(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} holds no list 'members' in valid JSON: {error}") from error
    names = content.get("members") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise InputError(f"{path} holds no list 'members' of names of folders beside it")
    if len(set(names)) < len(names):
        raise InputError(f"{path} names a member twice; accepted are different folders")
    _check(_Ensemble, path, content, "ensemble")
    _check_seal(path, content, "sha256")
    return content


def read_card(path: Path) -> dict[str, Any] | None:
    """The card of a potential, dates as text; None if there is no such file.

    Raises:
        InputError: for a file that is not readable, no YAML, of other types, or changed since it was written.
    """
    if not path.is_file():
        return None
    import yaml

    class Loader(yaml.SafeLoader):
        """Without references, which can make a short text endless, and not deeper than what is plain."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent) or self.depth > MAX_DEPTH:
                raise yaml.YAMLError(f"references (*name) and more than {MAX_DEPTH} levels are not accepted")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        card = yaml.load(_read_text(path), Loader)
        check_plain(card)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no YAML of a card: {' '.join(str(error).split())}") from error
    if not isinstance(card, dict):
        raise InputError(f"{path} holds a {type(card).__name__}; accepted is a mapping of keys to values")
    card = _texts(card)
    _check(_Card, path, card, "card")
    _check_seal(path, card, "card_sha256")
    return card


def seal(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The content with its hash under ``key``, which is found changed by ``read_card`` and ``read_ensemble``."""
    rest = {name: value for name, value in content.items() if name != key}
    return {key: content_hash(rest), **rest}  # first, so that a file that is cut does not lose it


def _check_seal(path: Path, content: Mapping[str, Any], key: str) -> None:
    named = {*_Card.model_fields, key}
    # A hash under a name that nobody writes is a seal whose name was damaged.
    stray = any(isinstance(v, str) and _HASH.fullmatch(v) for name, v in content.items() if name not in named)
    if stray or (key in content and seal(content, key)[key] != content[key]):
        raise InputError(f"{path} was changed or damaged: its {key} is not that of its content")


def _check(form: type[_Part], path: Path, content: Mapping[str, Any], what: str) -> None:
    try:
        form.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path} has a bad {what}: {explain(error)}") from error


def _read_text(path: Path) -> str:
    most = _MAX_BYTES[path.suffix]
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > most:
        raise InputError(f"{path} is longer than {most} bytes, which no file of its kind is")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})") from error


def _texts(value: Any) -> Any:
    """YAML's dates and keys as text, so that a card fits into JSON."""
    if isinstance(value, dict):
        return {str(key): _texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _is_plain(name: str) -> bool:
    """Whether it names something in a folder, not above or elsewhere."""
    return name not in ("", ".", "..") and name.isprintable() and Path(name).name == name
