"""Part 5: nequip, mace-torch and metatrain's PET beside ours, in turns, each in a process of its own."""

import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from peers import DENSE, EQUIVARIANT, TRANSFORMER, Worker, take_turns

from gpu_parts.runner import Case
from gpu_parts.systems import Options, automatic, box, molecule

NEQUIP = {"nequip, eager": {}}
COMPILED = {"nequip, torch.compile": {"mode": "compile"}}
AHEAD = {"nequip, ahead of time": {"mode": "aot"}}
MODULES = {"nequip": "nequip", "mace": "mace", "pet": "metatrain"}
SECONDS_PER_CONTESTANT = 2.5

_workers: dict[str, Worker] = {}  # of this process, kept from case to case: imports take long


def cases(options: Options) -> list[Case]:
    """The most telling first; what compiles long is in rows of its own, so that it costs no other."""
    evaluate, train, ase = ({"work": work} for work in ("evaluate", "train", "ase"))
    if options.quick:
        model = next(iter(options.sizes.models.values())) | DENSE
        rows = [("27 atoms", 27, evaluate, model, NEQUIP | {"mace": {}, "pet": {}})]
    else:
        boxes, molecules = EQUIVARIANT | DENSE, EQUIVARIANT | {"avg_num_neighbors": 20.0}
        rows = []
        for n_atoms in options.sizes.atoms:
            rows.append((f"{n_atoms} atoms, equivariant", n_atoms, evaluate, boxes, NEQUIP | {"mace": {}}))
            rows.append((f"{n_atoms} atoms, transformer", n_atoms, evaluate, TRANSFORMER, {"pet": {}}))
        rows.append(("training step, 5 x 27 atoms", 27, train | {"batch": 5}, molecules, NEQUIP))
        rows.append(("9 atoms, one ASE call", 9, ase, molecules, NEQUIP))
        rows.append(("1000 atoms, equivariant", 1000, evaluate, boxes, COMPILED))
        rows.append(("training step, 5 x 27 atoms", 27, train | {"batch": 5}, molecules, COMPILED))
        rows.append(("1000 atoms, equivariant", 1000, evaluate, boxes, AHEAD))
    return [
        Case({"row": name, "against": "; ".join(peers)}, partial(_contest, options, n_atoms, work, model, peers))
        for name, n_atoms, work, model, peers in rows
    ]


def _contest(
    options: Options, n_atoms: int, work: dict[str, Any], model: dict[str, Any], peers: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Medians in ms of ours and of the peers that can be imported; what keeps the others from it."""
    seconds = 0.1 if options.quick else SECONDS_PER_CONTESTANT
    with tempfile.TemporaryDirectory() as folder:
        structure = str(_write_structure(Path(folder), n_atoms, periodic=work["work"] == "evaluate"))
        task = work | {"model": model, "structure": structure, "device": options.device}
        task |= {"threads": 1 if options.quick else 2, "kernels": automatic(options)}
        contestants = {"equimd": (_worker(options, "ours"), task)}
        absent: dict[str, dict[str, Any]] = {}
        for name, extra in peers.items():
            peer = name.split(",")[0]
            if _folder(options, peer) is None and find_spec(MODULES[peer]) is None:
                absent[name] = {"error": f"No module named {MODULES[peer]!r}"}
            else:
                contestants[name] = (_worker(options, peer), task | extra)
        results = take_turns(contestants, seconds)
    for name, result in results.items():
        if "error" in result:  # its process may be in no state to go on
            _workers.pop("ours" if name == "equimd" else name.split(",")[0]).stop()
        elif "ms" in results["equimd"]:
            result["ratio"] = result["ms"] / results["equimd"]["ms"]
    if "error" in results["equimd"]:
        raise RuntimeError(f"equimd: {results['equimd']['error']}")
    return {"ms": results["equimd"]["ms"], "contestants": results | absent}


def _worker(options: Options, name: str) -> Worker:
    """A process for ours or for a peer: of its own environment, of its own packages, or of what there is here."""
    if name not in _workers:
        folder, python = _folder(options, name), Path(sys.executable)
        if folder is not None and (folder / "bin" / "python").exists():
            folder, python = None, folder / "bin" / "python"
        _workers[name] = Worker(python, f"run_{name}.py", packages=folder)
    return _workers[name]


def _folder(options: Options, name: str) -> Path | None:
    """What the user has given for a peer."""
    if options.peers is None or not (options.peers / name).is_dir():
        return None
    return options.peers / name


def _write_structure(folder: Path, n_atoms: int, periodic: bool) -> Path:
    """What workers read: numbers, positions and the edge of the cube, zero without a cell."""
    atoms = box(n_atoms) if periodic else molecule(n_atoms)
    path = folder / "structure.npz"
    np.savez(path, numbers=atoms.numbers, positions=atoms.positions, length=atoms.cell.array[0, 0])
    return path
