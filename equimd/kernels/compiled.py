"""Compiled kernels: source files in a cache folder, imported from there, kept by numba beside them.

numba caches only what it finds in a file. The folder is ``$EQUIMD_CACHE/kernels``, or ``equimd/kernels`` in the user's
cache folder; a temporary folder stands in where that cannot be written. A file is named by the hash of its contents.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from equimd.kernels.codegen import N_POINTERS, kernel_source
from equimd.kernels.plan import ConvolutionPlan

Kernel = Callable[..., None]
_kernels: dict[tuple[str, ConvolutionPlan, int, str], Kernel] = {}
_by_name: dict[str, tuple[ModuleType, Kernel]] = {}  # the machine code lives as long as its module
_lock = threading.RLock()


def _after_fork() -> None:
    """In the child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def get_kernel(kind: str, plan: ConvolutionPlan, n_channels: int, dtype: str) -> Kernel:
    """The C function of ``codegen.kernel_source``, called with N_POINTERS addresses and a range; releases the GIL."""
    key = (kind, plan, n_channels, dtype)
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            if key not in _kernels:
                _kernels[key] = compile_kernel(kernel_source(*key), N_POINTERS)
            kernel = _kernels[key]
    return kernel


def cache_folder() -> Path:
    """Where kernels are kept between runs; not created here."""
    override = os.environ.get("EQUIMD_CACHE")
    if override:
        return Path(override) / "kernels"
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "equimd" / "kernels"


def compile_kernel(source: str, n_pointers: int, modules: Sequence[str] = ()) -> Kernel:
    """The C function ``kernel`` of a module: so many addresses, then a range; releases the GIL.

    ``modules`` are the sources of what it imports by ``module_name``. The same source is compiled once.
    """
    name = module_name(source)
    with _lock:
        if name not in _by_name:
            for imported in modules:
                import_source(imported)
            module = _import(source)
            signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * n_pointers, ctypes.c_int64, ctypes.c_int64)
            _by_name[name] = module, signature(module.kernel.address)
        return _by_name[name][1]


def module_name(source: str) -> str:
    """The name under which a source is imported; others may import it, once it is."""
    return f"_equimd_kernel_{hashlib.sha256(source.encode()).hexdigest()[:20]}"


def import_source(source: str) -> ModuleType:
    """The module of a source, imported once, from a file of the cache folder."""
    with _lock:
        return sys.modules.get(module_name(source)) or _import(source)


def _import(source: str) -> ModuleType:
    try:
        return _load(source, cache_folder())
    except (OSError, RuntimeError):  # not writable: by us, or (RuntimeError) by numba
        return _load(source, _temporary_folder())


def _load(source: str, folder: Path) -> ModuleType:
    """Write ``source`` where it is not there yet, whole or not at all, and import it (which compiles it)."""
    name = module_name(source)
    path = folder / f"{name}.py"
    if not (path.is_file() and path.read_text(encoding="utf-8") == source):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
        try:
            with open(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(source)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OSError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="equimd-kernels-")  # private to the user: what lies in it is executed
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
