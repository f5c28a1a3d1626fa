"""From what the user names (a potential, a device, a precision) to a module that is ready to compute."""

import copy
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
    """What tables call it: the folder's name for ``<folder>/model.safetensors``, else the file's without ending."""
    path = Path(name_or_path)
    if path.suffix == ".safetensors":
        return path.resolve().parent.name if path.stem == "model" else path.stem
    return path.name or path.resolve().name


def symmetrized(potential: Potential, mode: str | Mapping[str, Any] | None) -> Potential:
    """The potential, wrapped where symmetry is to be restored at inference."""
    if mode is None:
        return potential
    from equimd.models.symmetrized import SymmetrizedPotential

    options: dict[str, Any] = {"mode": mode} if isinstance(mode, str) else dict(mode)
    return SymmetrizedPotential(potential, **options)
