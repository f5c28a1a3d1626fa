"""API docs from the docstrings: python docs/build.py [FOLDER], site/ unless given. A warning is an error."""

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc


def main(folder: Path) -> None:
    """Import every module, so that names which are imported on first use are there, and render."""
    import equimd

    modules = [equimd] + [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(equimd.__path__, "equimd.")
        if not module.name.endswith("__main__")
    ]
    for module in modules:
        for name in getattr(module, "__all__", ()):
            setattr(module, name, getattr(module, name))
    warnings.simplefilter("error", UserWarning)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("equimd", output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
