"""mace-torch as a worker of the peer benchmark."""

import numpy as np
import torch
from worker import device_of, serve, structure, versions


def setup(task):
    """Energy, forces and stress of one structure."""
    from ase import Atoms
    from e3nn import o3
    from mace import data, modules, tools
    from mace.tools import torch_geometric

    torch.set_num_threads(task["threads"])
    torch.set_default_dtype(torch.float32)
    m = task["model"]
    table = tools.AtomicNumberTable([1, 8])
    model = modules.ScaleShiftMACE(
        r_max=m["cutoff"],
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps("32x0e+32x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(2),
        avg_num_neighbors=m["avg_num_neighbors"],
        atomic_numbers=table.zs,
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        radial_MLP=[64, 64, 64],
    ).to(device_of(task))
    numbers, positions, length = structure(task)
    atoms = Atoms(numbers, positions, cell=[length or 100.0] * 3, pbc=length is not None)
    config = data.config_from_atoms(atoms, key_specification=data.KeySpecification())
    frame = data.AtomicData.from_config(config, z_table=table, cutoff=m["cutoff"])
    batch = next(iter(torch_geometric.dataloader.DataLoader([frame], batch_size=1))).to(device_of(task)).to_dict()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "edges": int(batch["edge_index"].shape[1])}
    facts["versions"] = versions("mace-torch", "e3nn", "torch")
    return lambda: model(dict(batch), compute_force=True, compute_stress=length is not None), facts


serve(setup)
