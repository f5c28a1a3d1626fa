"""The folder in which compiled kernels are kept between runs.

It is ``$EQUIMD_CACHE/kernels``, or ``equimd/kernels`` in the user's cache folder; a temporary folder stands in if that
cannot be written.
"""

import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

_importing = threading.RLock()


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


def keep(name: str, content: bytes) -> Path:
    """Write a file, whole or not at all, and say where it is."""
    try:
        return _write(cache_folder(), name, content)
    except OSError:
        return _write(_temporary_folder(), name, content)


def _write(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return folder / name


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="equimd-kernels-")  # private to the user: what lies in it is executed
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def import_source(source: str, name: str) -> ModuleType:
    """The module of a Python source, imported once, from a file: triton compiles only what it finds in one."""
    with _importing:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, keep(f"{name}.py", source.encode()))
        if spec is None or spec.loader is None:
            raise OSError(f"cannot import {name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
