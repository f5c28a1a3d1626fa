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
    import yaml

    from equimd.models.checkpoint import find_potential, list_potentials

    potentials = []
    for name in list_potentials():
        folder = find_potential(name)
        file = folder / "card.yaml"
        card = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        potentials.append(PotentialInfo(name=name, path=str(folder), card=_plain(card)))
    devices = ["cpu"] + [f"cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())]
    return Inventory(devices=devices, potentials=potentials, provenance=provenance())


def _plain(value: Any) -> Any:
    """YAML's dates as text, so that a card fits into JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
