"""From what the user names (a potential, a device, a precision) to a module that is ready to compute."""

import copy
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from equimd.errors import InputError
from equimd.kernels.ambient import building
from equimd.models.potential import Potential

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of "float32" or "float64"; anything else is refused."""
    if name not in _DTYPES:
        raise InputError(f"dtype is {name!r}; accepted are {' and '.join(_DTYPES)}")
    return _DTYPES[name]


def torch_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {str(name)!r}; accepted are auto, cpu, cuda and cuda:<index>")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"device is {str(name)!r} but there are {count} CUDA devices here; cpu is accepted")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


@building()
def resolve(
    potential: Potential | str | Path, device: str | torch.device, dtype: str
) -> tuple[Potential, str, dict[str, Any]]:
    """A potential in inference mode that is nobody else's, its name, and the header of its checkpoint ({} without)."""
    where, precision = torch_device(device), torch_dtype(dtype)
    if isinstance(potential, torch.nn.Module):
        module = copy.deepcopy(potential)
        name = str(getattr(potential, "name", "") or getattr(potential, "family", type(potential).__name__))
    elif isinstance(potential, str | Path):
        from equimd.models.checkpoint import load_potential

        module, name = load_potential(potential, device=str(where), dtype=dtype), potential_name(potential)
    else:
        raise InputError(f"potential is a {type(potential).__name__}; accepted are a name, a path or a Potential")
    module = _outside_inference_mode(module).to(device=where, dtype=precision).eval().requires_grad_(False)
    return module, name, dict(getattr(module, "header", None) or {})


def _outside_inference_mode(module: Potential) -> Potential:
    """The potential with normal tensors where it was made in inference mode: autograd takes no others.

    Parameters keep the module's names; those that modules share are shared no longer.
    """
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None and tensor.is_inference():
                part._parameters[name] = torch.nn.Parameter(tensor.detach().clone(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()
    return module


def potential_name(name_or_path: str | Path) -> str:
    """What tables call it: the folder's name for ``<folder>/model.safetensors``, else the file's without ending.

    A path to another potential of a shipped one's name keeps its last folder: ``runs/water-equivariant``.
    """
    from equimd.models.checkpoint import MODEL_FILE, shipped_folder

    path = Path(name_or_path)
    if shipped_folder(name_or_path, quiet=True) is not None:
        return path.name
    if path.suffix == ".safetensors":
        file, path = path, path.with_suffix("") if path.stem != "model" else path.resolve().parent
    else:
        file = path / MODEL_FILE
    name = path.name or path.resolve().name
    shipped = shipped_folder(name, quiet=True)
    if shipped is None or (file.exists() and file.samefile(shipped / MODEL_FILE)):
        return name
    return f"{path.resolve().parent.name}/{name}"


def weights_hash(potential: Potential) -> str:
    """SHA-256 of names and values of all weights, as they are on the device."""
    digest = hashlib.sha256()
    for key, tensor in potential.state_dict().items():
        digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(potential: Potential) -> str:
    """SHA-256 of all that decides predictions: weights, settings, species and energies of isolated atoms."""
    digest = hashlib.sha256(weights_hash(potential).encode())
    for part in potential.modules():
        if isinstance(part, Potential):
            energies = sorted((z, float(e)) for z, e in part.isolated_atom_energies.items())
            settings = part.settings.model_dump_json(exclude_defaults=True)  # so that a later version may add settings
            digest.update(f"{part.family} {settings} {part.species} {energies}".encode())
    return digest.hexdigest()


def symmetrized(potential: Potential, mode: str | Mapping[str, Any] | None) -> Potential:
    """The potential, wrapped if symmetry is to be restored at inference."""
    if mode is None:
        return potential
    from equimd.models.symmetrized import SymmetrizedPotential

    if not isinstance(mode, str | Mapping):
        raise InputError(f"symmetrize is {mode!r}; accepted are None, a mode, or a mapping with settings")
    options: dict[str, Any] = {"mode": mode} if isinstance(mode, str) else dict(mode)
    accepted = list(inspect.signature(SymmetrizedPotential).parameters)[1:]
    unknown = [key for key in options if key not in accepted]
    if unknown:
        raise InputError(f"symmetrize has {unknown[0]!r}; accepted are {', '.join(accepted)}")
    return SymmetrizedPotential(potential, **options)
