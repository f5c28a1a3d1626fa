"""What openmmml's entry point ``equimd`` loads: a factory that imports the engine's room when it is used.

openmmml loads its entry points while it is being imported. A factory in the module that imports openmmml would be
looked up in a module that is only half there, whenever that module comes first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from equimd.errors import InputError

if TYPE_CHECKING:
    from equimd.calculators.openmm import EquimdPotentialImpl
    from equimd.models.potential import Potential


class EquimdPotentialImplFactory:
    """Makes ``MLPotential("equimd", modelPath=...)``; has what openmmml asks of an ``MLPotentialImplFactory``."""

    def createImpl(
        self, name: str, modelPath: "str | Path | Potential | None" = None, **args: Any
    ) -> "EquimdPotentialImpl":
        """The potential of that name or path; a Potential object works too, but cannot be serialised."""
        if modelPath is None:
            raise InputError(f"MLPotential({name!r}) needs modelPath=..., a potential's name or path")
        if args:
            raise InputError(f"MLPotential({name!r}) got {', '.join(sorted(args))}; accepted is modelPath")
        from equimd.calculators.openmm import EquimdPotentialImpl

        return EquimdPotentialImpl(modelPath)
