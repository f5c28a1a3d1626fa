"""What is there: the installation and its potentials."""

from typing import Any

from equimd.results import Block, Provenance, Result, provenance


class PotentialInfo(Block):
    """A potential that is ready to run, and its card (null without one)."""

    name: str
    path: str
    card: dict[str, Any] | None


class Inventory(Result):
    """Versions, devices and potentials."""

    devices: list[str]
    potentials: list[PotentialInfo]
    provenance: Provenance


def inventory() -> Inventory:
    """What this installation offers on this machine."""
    import torch

    from equimd.models.checkpoint import find_potential, list_potentials
    from equimd.models.header import CARD_FILE, read_card

    potentials = []
    for name in list_potentials():
        folder = find_potential(name)
        potentials.append(PotentialInfo(name=name, path=str(folder), card=read_card(folder / CARD_FILE)))
    devices = ["cpu"] + [f"cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())]
    return Inventory(devices=devices, potentials=potentials, provenance=provenance())
