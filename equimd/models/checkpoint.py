"""Checkpoints: tensors in a safetensors file, everything else as JSON in its metadata; nothing in a file is executed.

A potential is a folder with ``model.safetensors`` (and, where it is shipped, card.yaml, recipe.yaml, start.xyz), or one
with ``ensemble.json``, whose ``members`` are such folders inside. The folder that holds such folders is the registry.
"""

import difflib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from equimd.errors import InputError, NameWarning
from equimd.kernels.ambient import building
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.potential import MAX_ATOMIC_NUMBER, Potential
from equimd.models.transformer import TransformerPotential, TransformerSettings
from equimd.results import DISK_FULL, write_bytes_atomically

FORMAT = "equimd"
FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
ENSEMBLE_FILE = "ensemble.json"

ModelSettings = Annotated[EquivariantSettings | TransformerSettings, Field(discriminator="family")]

_SETTINGS: TypeAdapter[EquivariantSettings | TransformerSettings] = TypeAdapter(ModelSettings)
_REQUIRED = ("format_version", "family", "settings", "species", "isolated_atom_energies")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# What a file is that is not safetensors, by its first bytes.
_FOREIGN = {
    b"\x80": "a pickle, which could run code",
    b"PK\x03\x04": "a zip archive, as torch.save writes (a pickle inside)",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
}


def build_potential(
    settings: EquivariantSettings | TransformerSettings,
    species: tuple[int, ...],
    isolated_atom_energies: Mapping[int, float],
) -> Potential:
    """A new potential of the family that ``settings`` names, its weights drawn from torch's global generator."""
    if isinstance(settings, EquivariantSettings):
        return EquivariantPotential(settings, species, isolated_atom_energies)
    if isinstance(settings, TransformerSettings):
        return TransformerPotential(settings, species, isolated_atom_energies)
    raise InputError(f"settings are {type(settings).__name__}; accepted are EquivariantSettings, TransformerSettings")


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: where it cannot be written (no permission, no folder).
        OSError: where the disk is full, which is no fault of the input.
    """
    try:
        write_bytes_atomically(path, content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"cannot write {path} ({len(content)} bytes): {error.strerror or error}") from error


def save_checkpoint(path: str | Path, potential: Potential, header: Mapping[str, Any] | None = None) -> None:
    """Write weights and header; format, version, family, settings, species and isolated-atom energies are filled in."""
    from equimd import __version__

    full = {
        "package_version": __version__,
        **(header or {}),
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": potential.family,
        "settings": potential.settings.model_dump(mode="json"),
        "species": list(potential.species),
        "isolated_atom_energies": {str(z): e for z, e in potential.isolated_atom_energies.items()},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in potential.state_dict().items()}
    metadata = {"format": FORMAT, "header": json.dumps(full, ensure_ascii=False, allow_nan=False)}
    write_file(Path(path), to_safetensors(tensors, metadata))


def read_tensors(path: Path, kind: str = FORMAT) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file whose metadata says ``kind``; refuses anything else in one line."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind or "header" not in metadata:
                raise InputError(f"{path} is a safetensors file of something else; accepted is format {kind!r}")
            header = json.loads(metadata["header"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        # The length that a file begins with may look like any of these; after it, a safetensors file goes on as JSON.
        for magic, what in _FOREIGN.items():
            if start.startswith(magic) and start[4:] != b"\0\0\0\0{":
                raise InputError(f"{path} is {what}; accepted is a safetensors file written by equimd") from error
        raise InputError(f"{path} is truncated or no safetensors file ({error})") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} has a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} has a header that is a {type(header).__name__}; accepted is an object")
    return header, tensors


@building()
def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: str = "float32"
) -> tuple[Potential, dict[str, Any]]:
    """The potential of a checkpoint in evaluation mode, and its header.

    Raises:
        InputError: for a missing, truncated, foreign, inconsistent or newer-format file, in one line.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}; accepted are {', '.join(_DTYPES)}")
    header, tensors = read_tensors(path)
    missing = [key for key in _REQUIRED if key not in header]
    if missing:
        raise InputError(f"{path} has no {missing[0]!r} in its header")
    version = header["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(f"{path} has format_version {version}; this equimd reads up to {FORMAT_VERSION}: upgrade it")
    try:
        settings = _SETTINGS.validate_python(header["settings"])
        species = tuple(int(z) for z in header["species"])
        energies = {int(z): float(e) for z, e in header["isolated_atom_energies"].items()}
        if not species or not all(1 <= z <= MAX_ATOMIC_NUMBER for z in species):
            raise ValueError(f"species {list(species)}")
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
            potential = build_potential(settings, species, energies)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path} has bad settings: {where}: {first['msg']}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} has a bad header: {error}") from error
    _load_weights(path, potential, tensors)
    return potential.to(device=_device(device), dtype=_DTYPES[dtype]).eval(), header


def _load_weights(path: Path, potential: Potential, tensors: dict[str, torch.Tensor]) -> None:
    expected = potential.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise InputError(f"{path} lacks the tensor {name!r} that its settings ask for")
        if tensors[name].shape != tensor.shape:
            found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            raise InputError(f"{path} has {name!r} of shape {found}; its settings ask for {wanted}")
        if not torch.isfinite(tensors[name]).all():
            raise InputError(f"{path} has values in {name!r} that are not finite")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise InputError(f"{path} has a tensor {extra[0]!r} that its settings do not know")
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        potential.to(torch.float64)  # so that weights trained in float64 are not rounded on the way
    potential.load_state_dict(tensors)


def _device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is {str(device)!r}; accepted are auto, cpu, cuda, cuda:<index>") from error


def registry_folders() -> list[Path]:
    """Where named potentials are looked for: beside the installed package, then in the checkout."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "potentials", package.parent / "potentials") if folder.is_dir()]


def list_potentials() -> list[str]:
    """Names of the potentials that are ready to run."""
    return sorted({file.parent.name for folder in registry_folders() for file in folder.glob(f"*/{MODEL_FILE}")})


def shipped_folder(name_or_path: str | Path, beside: str | Path = "", quiet: bool = False) -> Path | None:
    """The folder of the shipped potential that a bare name stands for; None for every other name and for paths.

    A bare name is that of a shipped potential first, and ``./name`` is a path. A file or folder of the same name in
    ``beside`` (by default the working directory) is then not used, and a NameWarning says so unless ``quiet``. A
    ``Path`` drops its ``./``, so it means the file or folder if there is one.
    """
    text = str(name_or_path)
    if Path(text).name != text or text not in list_potentials():
        return None
    found = next(folder / text for folder in registry_folders() if (folder / text / MODEL_FILE).is_file())
    rival = Path(beside, text)
    if not rival.exists() or rival.samefile(found):
        return found
    if isinstance(name_or_path, Path):
        return None
    if not quiet:
        there = rival if str(beside) not in ("", ".") else f"./{text}"
        warnings.warn(
            f"{text!r} is the potential that comes with equimd, and {there} is not used; write './{text}' for that",
            NameWarning,
            stacklevel=1,
        )
    return found


def find_potential(name_or_path: str | Path, beside: str | Path = "") -> Path:
    """The folder of a shipped potential, or the folder or .safetensors file at a path; see ``shipped_folder``.

    Relative paths start at ``beside``, by default the working directory.

    Raises:
        InputError: for an unknown name, with the nearest and all available ones.
    """
    text = str(name_or_path)
    shipped = shipped_folder(name_or_path, beside)
    if shipped is not None:
        return shipped
    path = Path(beside, name_or_path)
    if text and os.path.isfile(path):  # unlike Path's, it takes any text
        return path
    if text and any(os.path.isfile(path / file) for file in (MODEL_FILE, ENSEMBLE_FILE)):
        return path
    names = list_potentials()
    if text and os.path.isdir(path):
        raise InputError(f"the folder {path} holds neither {MODEL_FILE} nor {ENSEMBLE_FILE}")
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    known = ", ".join(names) or "none installed"
    raise InputError(f"no potential is called {text!r}{hint}; accepted are a path and: {known}")


def load_potential(name_or_path: str | Path, device: str | torch.device = "auto", dtype: str = "float32") -> Potential:
    """A trained potential by name or path, ready to compute; ``.header`` is its header, ``.card`` its card or None.

    The folder of an ensemble gives the mean of its members; its header is that of the first, with ``members``
    and the device-hours of all.
    """
    found = find_potential(name_or_path)
    if found.is_dir() and not (found / MODEL_FILE).is_file():
        return _load_ensemble(found, device, dtype)
    file = found / MODEL_FILE if found.is_dir() else found
    potential, header = load_checkpoint(file, device, dtype)
    potential.header = header  # type: ignore[assignment]
    potential.card = _read_card(file.parent / "card.yaml")  # type: ignore[assignment]
    return potential


def _load_ensemble(folder: Path, device: str | torch.device, dtype: str) -> Potential:
    from equimd.models.ensemble import EnsemblePotential

    file = folder / ENSEMBLE_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = content["members"]
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_plain(name) for name in names):
            raise TypeError
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} holds no list 'members' of names of folders beside it") from error
    loaded = [load_checkpoint(folder / name / MODEL_FILE, device, dtype) for name in names]
    ensemble = EnsemblePotential([potential for potential, _ in loaded]).eval()
    ledgers = [header.get("ledger") or {} for _, header in loaded]
    costs = {key: sum(ledger.get(key) or 0 for ledger in ledgers) for key in ("hours", "steps", "frames_seen")}
    ensemble.header = {  # type: ignore[assignment]
        **loaded[0][1],
        "name": content.get("name", folder.name),
        "members": names,
        "ledger": {**ledgers[0], **costs, "device_hours": content.get("device_hours")},
    }
    ensemble.card = _read_card(folder / "card.yaml")  # type: ignore[assignment]
    return ensemble


def _is_plain(name: str) -> bool:
    """Whether it names something in a folder, not above or elsewhere."""
    return name not in ("", ".", "..") and Path(name).name == name


def _read_card(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    import yaml

    try:
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return card if isinstance(card, dict) else None
