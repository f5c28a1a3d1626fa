"""``equimd info``: versions, devices, potentials."""

import json as json_module
from typing import Annotated

import typer


def command(
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Versions, devices and the potentials that can be named."""
    import torch

    from equimd.models.checkpoint import find_potential, list_potentials
    from equimd.results import provenance

    machine = provenance(n_threads=torch.get_num_threads())
    devices = ["cpu"] + [f"cuda:{k} {torch.cuda.get_device_name(k)}" for k in range(torch.cuda.device_count())]
    potentials = {name: str(find_potential(name)) for name in list_potentials()}
    if json:
        print(json_module.dumps({**machine.model_dump(), "devices": devices, "potentials": potentials}, indent=2))
        return
    print(f"{machine.processor}, {machine.n_threads} threads, Python {machine.python}")
    print(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    print(f"devices: {', '.join(devices)}")
    for name, folder in potentials.items():
        print(f"  {name:<32} {folder}")
