"""What openmmml's entry points load: a factory that imports the engine's room when it is used.

openmmml loads its entry points while it is being imported. A factory in the module that imports openmmml would be
looked up in a module that is only half there, whenever that module comes first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from equimd.errors import InputError

if TYPE_CHECKING:
    from equimd.calculators.openmm import EquimdPotentialImpl
    from equimd.models.potential import Potential

GENERAL = "equimd"
"""The entry point that takes any potential; each shipped potential has one of its own name, too."""


class EquimdPotentialImplFactory:
    """Makes ``MLPotential("equimd", modelPath=...)`` and ``MLPotential("ethanol-equivariant")``."""

    def createImpl(
        self, name: str, modelPath: "str | Path | Potential | None" = None, **args: Any
    ) -> "EquimdPotentialImpl":
        """The potential of that name, path or object; without ``modelPath``, the shipped one called ``name``."""
        if args:
            raise InputError(f"MLPotential({name!r}) got {', '.join(sorted(args))}; accepted is modelPath")
        if name == GENERAL and modelPath is None:
            raise InputError(f"MLPotential({name!r}) needs modelPath=..., a potential's name or path")
        from equimd.calculators.openmm import EquimdPotentialImpl
        from equimd.models.checkpoint import find_potential, shipped_folder

        if modelPath is None:
            find_potential(name)  # refused here if there is none
        elif shipped_folder(name, quiet=True) is not None:
            raise InputError(f"MLPotential({name!r}) takes no modelPath; write MLPotential({GENERAL!r}, modelPath=...)")
        return EquimdPotentialImpl(name if modelPath is None else modelPath)
