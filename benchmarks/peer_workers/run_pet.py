"""metatrain's PET, with its default hyper-parameters, as a worker of the peer benchmark."""

import torch
from worker import device_of, serve, structure, versions


def setup(task):
    """Energy and forces of one structure, neighbour list included."""
    from ase import Atoms
    from metatomic.torch import ModelOutput, systems_to_torch
    from metatrain.pet import PET
    from metatrain.pet.documentation import ModelHypers
    from metatrain.utils.data import DatasetInfo
    from metatrain.utils.data.target_info import get_energy_target_info
    from metatrain.utils.hypers import init_with_defaults
    from metatrain.utils.neighbor_lists import get_system_with_neighbor_lists

    torch.set_num_threads(task["threads"])
    target = get_energy_target_info("energy", {"quantity": "energy", "unit": "eV"}, add_position_gradients=True)
    info = DatasetInfo(length_unit="angstrom", atomic_types=[1, 8], targets={"energy": target})
    model = PET(init_with_defaults(ModelHypers), info).eval().to(device_of(task))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    numbers, positions, length = structure(task)
    atoms = Atoms(numbers, positions, cell=[length] * 3 if length else None, pbc=length is not None)
    bare = systems_to_torch([atoms], dtype=torch.float32, device=device_of(task), positions_requires_grad=True)[0]
    system = get_system_with_neighbor_lists(bare, model.requested_neighbor_lists())
    output = {"energy": ModelOutput(quantity="energy", unit="eV", per_atom=False)}

    def call():
        energy = model([system], output)["energy"].block().values
        torch.autograd.grad(energy.sum(), system.positions)

    facts = {"parameters": sum(p.numel() for p in model.parameters())}
    facts["versions"] = versions("metatrain", "metatomic-torch", "torch")
    return call, facts


serve(setup)
