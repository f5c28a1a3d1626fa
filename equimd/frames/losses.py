"""What a frame holds and a file cannot: said once for each file, when it is written."""

import warnings
from typing import Any

from ase import Atoms

from equimd.frames.labels import ATOM_RESULTS, CONFIG_RESULTS


class NotWrittenWarning(UserWarning):
    """Something of a frame that is not in the file that was written."""


class Losses:
    """Warns, once each, of what is not written to the file ``name`` of this format."""

    def __init__(self, name: str, file_format: str) -> None:
        self._name, self._format = name, file_format
        self._said: set[str] = set()

    def add(self, what: str) -> None:
        """Something that the format cannot hold."""
        self.say(f"{self._format} cannot hold {what}, which is not written")

    def say(self, text: str) -> None:
        """A line about this file, once."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"{self._name}: {text}", NotWrittenWarning, stacklevel=4)


def fresh_results(atoms: Atoms, losses: Losses) -> dict[str, Any]:
    """Results, by ASE's names, that the calculator holds for these very positions; others count as losses."""
    held = {name: value for name, value in getattr(atoms.calc, "results", {}).items() if value is not None}
    held = {name: value for name, value in held.items() if name in CONFIG_RESULTS or name in ATOM_RESULTS}
    if held and atoms.calc is not None and atoms.calc.check_state(atoms):
        losses.say(f"the calculator holds {', '.join(held)} of other positions, which are not written")
        return {}
    return held
