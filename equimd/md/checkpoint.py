"""What a run leaves beside its trajectory, and what must be as it was when the run is resumed."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses

from equimd.errors import InputError
from equimd.frames import read_frames
from equimd.md.constraints import described
from equimd.md.settings import MDSettings
from equimd.results import write_text_atomically

# Below what files of structures print; a text file that is read by another version may differ by so much.
_SAME = 1e-8
_ELECTRONS = re.compile(r"charge|spin|multiplicity|magmom", re.IGNORECASE)

State = dict[str, Any]


def state_path(output: Path) -> Path:
    """The file beside a trajectory that holds the last checkpoint."""
    return output.with_name(output.name + ".state.json")


def write_state(output: Path, state: State) -> None:
    """Replace the state beside a trajectory."""
    write_text_atomically(state_path(output), json.dumps(state))


def describe(atoms: Atoms) -> dict[str, Any]:
    """All of a start structure that decides a run, in JSON's types; None stands for ASE's default."""
    masses, momenta = atoms.get_masses(), atoms.get_momenta()
    charges, moments = atoms.get_initial_charges(), atoms.get_initial_magnetic_moments()
    electrons = {str(key): _plain(value) for key, value in atoms.info.items() if _ELECTRONS.search(str(key))}
    return {
        "pbc": atoms.pbc.tolist(),
        "cell": atoms.cell.array.tolist(),
        "positions": atoms.positions.tolist(),
        "momenta": momenta.tolist() if momenta.any() else None,
        "masses": None if np.array_equal(masses, atomic_masses[atoms.numbers]) else masses.tolist(),
        "constraints": described(atoms),
        "initial charges": charges.tolist() if charges.any() else None,
        "initial magnetic moments": moments.tolist() if moments.any() else None,
        "charge and spin": dict(sorted(electrons.items())),
    }


def read_state(output: Path, settings: MDSettings, atoms: Atoms, fingerprint: dict[str, Any]) -> State:
    """The state beside a trajectory, if the run may go on with these settings, structure and calculator.

    Raises:
        InputError: the state cannot be read, or something but ``steps`` differs (named with both values), or fewer
            steps are asked for than are done.
    """
    path = state_path(output)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        before, old = state["calculator"], state["settings"]
    except OSError as error:
        raise InputError(f"cannot resume: {path} cannot be read ({error.strerror}); start without resume") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot resume: {path} is no checkpoint of a run") from error
    if state["numbers"] != atoms.numbers.tolist():
        raise InputError(f"cannot resume: {path} holds other atoms than the structure given")
    for key in dict.fromkeys([*before, *fingerprint]):
        if before.get(key) != fingerprint.get(key):
            raise InputError(
                f"cannot resume: the calculator's {key} was {before.get(key)!r} and is {fingerprint.get(key)!r}"
            )
    new = settings.model_dump()
    for key in new:
        if key != "steps" and old.get(key, new[key]) != new[key]:
            raise InputError(f"cannot resume: {key} was {old.get(key)!r} and is {new[key]!r}; only steps may change")
    _check_start(state, atoms, path)
    done = _steps_done(state, settings, output)
    if settings.steps < done:
        raise InputError(f"cannot resume: steps is {settings.steps}, and the run has done {done}; accepted: more")
    return state


def _check_start(state: State, atoms: Atoms, path: Path) -> None:
    before, now = state.get("start"), describe(atoms)
    if before is None:
        warnings.warn(
            f"{path} was written by an earlier version, which kept no start structure: only elements are compared",
            UserWarning,
            stacklevel=2,
        )
        return
    for item in now:
        if (difference := _difference(item, before.get(item), now[item], atoms)) is not None:
            raise InputError(
                f"cannot resume: the start structure's {item} changed: {difference};"
                " give the structure that the run began with"
            )


def _difference(item: str, before: Any, now: Any, atoms: Atoms) -> str | None:
    """The first thing that differs, with both values; None if nothing does."""
    if item == "masses":
        default = atomic_masses[atoms.numbers].tolist()
        before, now = before or default, now or default
    elif item in ("momenta", "initial charges", "initial magnetic moments"):
        zeros = np.zeros(np.shape(before or now or 0.0)).tolist()
        before, now = before or zeros, now or zeros
    if item == "constraints":  # a slab may have thousands: the first that is not in the other list
        lost, new = ([one for one in a if one not in b] for a, b in ((before, now), (now, before)))
        before, now = lost[:1], new[:1]
    if item in ("pbc", "constraints", "charge and spin"):
        return None if before == now else f"{before or 'none'} before and {now or 'none'} now"
    old, new = np.asarray(before, dtype=np.float64), np.asarray(now, dtype=np.float64)
    if old.shape != new.shape:
        return f"the shape was {old.shape} and is {new.shape}"
    away = np.abs(old - new) > _SAME + _SAME * np.abs(old)
    if not away.any():
        return None
    if item == "cell":
        return f"{before} before and {now} now"
    atom = int(np.argwhere(away)[0][0])
    return f"{old[atom].tolist()} before and {new[atom].tolist()} now, of atom {atom} ({atoms.symbols[atom]})"


def _steps_done(state: State, settings: MDSettings, output: Path) -> int:
    """Steps that the run has been seen to do; frames lie at every stride from 0 on."""
    held = len(read_frames(output)) if output.exists() else 0
    return max(state["step"], state.get("reached", {}).get("step", 0), (held - 1) * settings.stride)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
