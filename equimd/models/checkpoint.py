"""Checkpoints: tensors in a safetensors file, everything else as JSON in its metadata; nothing in a file is executed.

A potential is a folder with ``model.safetensors`` (and, where it is shipped, card.yaml, recipe.yaml, start.xyz), or one
with ``ensemble.json``, whose ``members`` are such folders inside. The folder that holds such folders is the registry.
"""

import difflib
import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch.overrides import TorchFunctionMode

from equimd.errors import InputError, NameWarning
from equimd.kernels.ambient import building
from equimd.models.container import read_tensors, write_tensors
from equimd.models.equivariant import EquivariantPotential, EquivariantSettings
from equimd.models.header import CARD_FILE, check_header, read_card, read_ensemble
from equimd.models.potential import Potential
from equimd.models.transformer import TransformerPotential, TransformerSettings
from equimd.results import explain

FORMAT = "equimd"
MODEL_FILE = "model.safetensors"
ENSEMBLE_FILE = "ensemble.json"

ModelSettings = Annotated[EquivariantSettings | TransformerSettings, Field(discriminator="family")]

_SETTINGS: TypeAdapter[EquivariantSettings | TransformerSettings] = TypeAdapter(ModelSettings)
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


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


def save_checkpoint(path: str | Path, potential: Potential, header: Mapping[str, Any] | None = None) -> None:
    """Write weights and header; format, version, family, settings, species and isolated-atom energies are filled in."""
    from equimd import __version__

    full = {
        "package_version": __version__,
        **(header or {}),
        "format": FORMAT,
        "family": potential.family,
        "settings": potential.settings.model_dump(mode="json"),
        "species": list(potential.species),
        "isolated_atom_energies": {str(z): e for z, e in potential.isolated_atom_energies.items()},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in potential.state_dict().items()}
    write_tensors(Path(path), FORMAT, full, tensors)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a checkpoint, checked as ``load_checkpoint`` does."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    header, tensors = read_tensors(path, FORMAT)
    check_header(path, header)
    return header, tensors


@building()
def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: str = "float32"
) -> tuple[Potential, dict[str, Any]]:
    """The potential of a checkpoint in evaluation mode, and its header.

    Raises:
        InputError: for a missing, truncated, damaged, foreign, inconsistent or newer-format file, in one line.
    """
    path = Path(path)
    if dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}; accepted are {', '.join(_DTYPES)}")
    header, tensors = _read(path)
    species = tuple(header["species"])
    energies = {int(z): float(e) for z, e in header["isolated_atom_energies"].items()}
    try:
        settings = _SETTINGS.validate_python(header["settings"])
    except ValidationError as error:
        raise InputError(f"{path} has bad settings: {explain(error)}") from error
    try:
        bounded = _Bounded(path, sum(tensor.numel() for tensor in tensors.values()))
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), bounded:  # the weights drawn here are overwritten
            potential = build_potential(settings, species, energies)
        _check_weights(path, potential, tensors)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has a bad header: {error}") from error
    stored = {tensor.dtype for tensor in tensors.values()}  # weights trained in float64 are not rounded on the way
    potential.to(torch.float64 if torch.float64 in stored else torch.float32).load_state_dict(tensors)
    return potential.to(device=_device(device), dtype=_DTYPES[dtype]).eval(), header


class _Bounded(TorchFunctionMode):
    """Refuse to make many more numbers than a file holds: its settings may ask for any size."""

    def __init__(self, path: Path, n_numbers: int) -> None:
        super().__init__()
        self.path, self.n_numbers = path, n_numbers
        self.left = 4 * n_numbers + 100_000  # buffers and what stands in between

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            sizes = args[0] if args and isinstance(args[0], tuple | list) else args
            self.left -= math.prod(size for size in sizes if isinstance(size, int))
            if self.left < 0:
                raise InputError(f"{self.path} holds {self.n_numbers} numbers; its settings ask for many more")
        return func(*args, **(kwargs or {}))


_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


def _check_weights(path: Path, shapes: Potential, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors whose names, shapes or types are not those of ``shapes``."""
    expected = shapes.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise InputError(f"{path} lacks the tensor {name!r} that its settings ask for")
        found = tensors[name]
        if found.shape != tensor.shape:
            raise InputError(
                f"{path} has {name!r} of shape {tuple(found.shape)}; its settings ask for {tuple(tensor.shape)}"
            )
        if found.dtype not in _DTYPES.values():
            accepted = " and ".join(_DTYPES)
            raise InputError(f"{path} has {name!r} of type {str(found.dtype)[6:]}; accepted are {accepted}")
        if not torch.isfinite(found).all():
            raise InputError(f"{path} has values in {name!r} that are not finite")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise InputError(f"{path} has a tensor {extra[0]!r} that its settings do not know")


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

    The file is verified by the SHA-256 in it, and by that of the card beside it.

    The folder of an ensemble gives the mean of its members; its header is that of the first, with ``members``
    and the device-hours of all.
    """
    found = find_potential(name_or_path)
    if found.is_dir() and not (found / MODEL_FILE).is_file():
        return _load_ensemble(found, device, dtype)
    file = found / MODEL_FILE if found.is_dir() else found
    card = read_card(file.with_name(CARD_FILE)) if file.name == MODEL_FILE else None
    if card is not None and card.get("sha256") not in (None, hashlib.sha256(file.read_bytes()).hexdigest()):
        raise InputError(f"{file} is damaged or not the file that the card beside it describes: its SHA-256 is another")
    potential, header = load_checkpoint(file, device, dtype)
    potential.header = header  # type: ignore[assignment]
    potential.card = card  # type: ignore[assignment]
    return potential


def _load_ensemble(folder: Path, device: str | torch.device, dtype: str) -> Potential:
    from equimd.models.ensemble import EnsemblePotential

    content = read_ensemble(folder / ENSEMBLE_FILE)
    names = content["members"]
    loaded = [load_checkpoint(folder / name / MODEL_FILE, device, dtype) for name in names]
    ensemble = EnsemblePotential([potential for potential, _ in loaded]).eval()
    ledgers = [header.get("ledger") or {} for _, header in loaded]
    costs = {key: sum(ledger.get(key) or 0 for ledger in ledgers) for key in ("hours", "steps", "frames_seen")}
    ensemble.header = {  # type: ignore[assignment]
        **loaded[0][1],
        "name": content.get("name") or folder.name,
        "members": names,
        "ledger": {**ledgers[0], **costs, "device_hours": content.get("device_hours")},
    }
    ensemble.card = read_card(folder / CARD_FILE)  # type: ignore[assignment]
    return ensemble
