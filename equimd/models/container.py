"""Files of tensors: a safetensors file with a header in JSON and a SHA-256 of both; nothing in a file is executed.

The file's metadata hold ``format`` (the kind of file), ``header`` (JSON) and ``sha256``. The hash covers the head of
the file (names, types, shapes and places of the tensors, format and header) as JSON with sorted keys, and the bytes of
the tensors. It finds damage, not malice: whoever edits a file can write a new hash, so the header is checked as well.
"""

import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors

from equimd.errors import InputError
from equimd.results import DISK_FULL, content_hash, parse_json, write_bytes_atomically

FORMAT_VERSION = 2
_WITHOUT_HASH = 1  # the last version of files that carry none
_MAX_HEAD = 32 * 2**20  # bytes; a header is a recipe, a ledger and a list of tensors
# Element types by their names in safetensors, and bytes of each.
_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# What a file is that is not safetensors, by its first bytes.
_FOREIGN = {
    b"\x80": "a pickle, which could run code",
    b"PK\x03\x04": "a zip archive, as torch.save writes (a pickle inside)",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
}


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: if it cannot be written (no permission, no folder).
        OSError: if the disk is full, which is no fault of the input.
    """
    try:
        write_bytes_atomically(path, content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"cannot write {path} ({len(content)} bytes): {error.strerror or error}") from error


def write_tensors(
    path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], finite: bool = True
) -> None:
    """Write tensors and header with their hash; ``format_version`` is filled in. ``finite`` refuses NaN in the header.

    Raises:
        InputError: if the header is not JSON, or if the file cannot be written.
    """
    try:
        text = json.dumps({**header, "format_version": FORMAT_VERSION}, ensure_ascii=False, allow_nan=not finite)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot write {path}: its header is not JSON ({error})") from error
    content = memoryview(to_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}))
    length = 8 + int.from_bytes(content[:8], "little")
    head = {"__metadata__": {"format": kind, "header": text}, **json.loads(bytes(content[8:length]))}
    head["__metadata__"]["sha256"] = _digest(head, content[length:])
    packed = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    packed += b" " * (-len(packed) % 8)  # tensors begin at a multiple of 8 bytes
    write_file(path, b"".join([len(packed).to_bytes(8, "little"), packed, content[length:]]))


def read_tensors(path: Path, kind: str, finite: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file whose metadata say ``kind``; ``finite`` refuses NaN in the header.

    Raises:
        InputError: for anything else, in one line: a file that is missing, foreign, truncated or damaged.
    """
    content = _read(path)
    length = 8 + int.from_bytes(content[:8], "little")
    try:
        head = parse_json(content[8:length].decode("utf-8"))
    except ValueError as error:
        raise InputError(_no_safetensors(path, content, str(error))) from error
    metadata = head.pop("__metadata__", None) if isinstance(head, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != kind or "header" not in metadata:
        raise InputError(f"{path} is a safetensors file of something else; accepted is format {kind!r}")
    if not set(metadata) <= {"format", "header", "sha256"} or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path} has metadata that equimd does not write; accepted are format, header and sha256")
    _check_entries(path, head, len(content) - length)
    digest = _digest({"__metadata__": metadata, **head}, memoryview(content)[length:])
    if metadata.get("sha256", digest) != digest:
        raise InputError(f"{path} is damaged: its SHA-256 is not the one stored in it; copy or make the file again")
    header = _header(path, metadata, finite)
    try:
        tensors = from_safetensors(content)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(_no_safetensors(path, content, str(error))) from error
    return header, tensors


def _read(path: Path) -> bytes:
    """The bytes of a file whose first eight give a length that its head can have."""
    try:
        status = path.stat()  # before it is opened, which waits for the other end of a pipe
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"cannot read {path}: it is no regular file; accepted is a safetensors file")
        with open(path, "rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > status.st_size - 8:
                raise InputError(_no_safetensors(path, start, "its head is longer than the file"))
            if length > _MAX_HEAD:
                raise InputError(f"{path} has a head of {length} bytes; accepted are up to {_MAX_HEAD}")
            return start + file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _no_safetensors(path: Path, content: bytes, why: str) -> str:
    # The length that a file begins with may look like any of these; after it, a safetensors file goes on as JSON.
    for magic, what in _FOREIGN.items():
        if content.startswith(magic) and content[4:9] != b"\0\0\0\0{":
            return f"{path} is {what}; accepted is a safetensors file written by equimd"
    return f"{path} is truncated, damaged or no safetensors file ({why})"


def _check_entries(path: Path, entries: Mapping[str, Any], n_bytes: int) -> None:
    """Refuse tensors of a type or size that the file cannot hold, before any is made."""
    for name, entry in entries.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
                raise TypeError
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"{path} has an entry for the tensor {name!r} that is not valid") from error
        if kind not in _TYPES:
            raise InputError(f"{path} has {name!r} of type {kind!r}; accepted are {', '.join(_TYPES)}")
        if len(shape) > 8 or math.prod(shape) * _TYPES[kind] != end - begin or end > n_bytes:
            raise InputError(f"{path} is truncated or damaged: {name!r} of shape {shape} does not fit its bytes")


def _header(path: Path, metadata: Mapping[str, str], finite: bool) -> dict[str, Any]:
    try:
        header = parse_json(metadata["header"], finite)
    except ValueError as error:
        raise InputError(f"{path} has a header that is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} has a header that is a {type(header).__name__}; accepted is an object")
    version = header.get("format_version", _WITHOUT_HASH)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {str(version)[:20]}; this equimd reads 1 to {FORMAT_VERSION}: upgrade it"
        )
    if version > _WITHOUT_HASH and "sha256" not in metadata:
        raise InputError(f"{path} has no SHA-256, which every file of format_version {version} carries; it was changed")
    return header


def _digest(head: Mapping[str, Any], data: memoryview) -> str:
    """SHA-256 of the head, the hash itself left out, and of the tensors' bytes."""
    metadata = {key: value for key, value in head["__metadata__"].items() if key != "sha256"}
    digest = hashlib.sha256(content_hash({**head, "__metadata__": metadata}).encode("ascii"))
    digest.update(data)
    return digest.hexdigest()
