"""Calculators by what a user writes: a shipped potential, a path, or ``package.module:factory``."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equimd.errors import InputError, in_one_line


def is_factory(name: str) -> bool:
    """Whether a name is ``package.module:factory`` or ``script.py:factory``, and no path."""
    module, colon, factory = name.rpartition(":")
    return bool(colon and module) and factory.replace(".", "_").isidentifier() and not Path(name).exists()


def make_foreign(name: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """What ``package.module:factory`` or ``script.py:factory`` returns: an ASE calculator; a class is its own factory.

    Modules are looked for in the working folder, too. Something that is no function and no class is taken as it is.

    Raises:
        InputError: for a file, module or factory that is not there, or that fails; for what it returns if that is no
            calculator.
    """
    module_name, _, path = name.rpartition(":")
    found: Any = _module(module_name)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise InputError(f"{module_name} has no {path!r}; accepted is the name of a function or class in it")
        found = getattr(found, attribute)
    if not callable(getattr(found, "get_forces", None)) or isinstance(found, type):
        try:
            found = found(**dict(arguments or {}))
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"{name} failed: {in_one_line(error)}") from error
    if not callable(getattr(found, "get_forces", None)):
        raise InputError(f"{name} returned a {type(found).__name__}; expected an ASE calculator")
    return found


def _module(name: str) -> Any:
    file = Path(name)
    if name.endswith(".py"):
        if not file.is_file():
            raise InputError(f"there is no file {name}; accepted is script.py:factory")
        return _from_file(file)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(f"there is no module {name!r} here; accepted is package.module:factory") from error
        raise InputError(f"{name} cannot be imported: {in_one_line(error)}") from error
    except Exception as error:
        raise InputError(f"{name} cannot be imported: {in_one_line(error)}") from error


def _from_file(file: Path) -> Any:
    """The module of a script, imported once; it may import what lies beside it."""
    name = f"equimd_user_{file.resolve().stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file.resolve()):
        return loaded
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{file} cannot be imported: {in_one_line(error)}") from error
    return module
