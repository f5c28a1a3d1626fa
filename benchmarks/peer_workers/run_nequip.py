"""nequip as a worker of the peer benchmark; mode "eager", "compile" or "aot", ahead of time for ASE."""

import tempfile

import numpy as np
import torch
from worker import device_of, serve, structure, versions


def setup(task):
    """One call of the work named in ``task``."""
    from nequip.utils.global_state import set_global_state

    set_global_state()
    torch.set_num_threads(task["threads"])
    model = _model(task).to(device_of(task))
    facts = {"parameters": sum(p.numel() for p in model.parameters())}
    facts["versions"] = versions("nequip", "e3nn", "torch")
    numbers, positions, length = structure(task)
    if task["work"] == "ase":
        return _ase_call(model, task, numbers, positions, length), facts
    frame = _frame(task, numbers, positions, length)
    if task["work"] == "train":
        return _training_step(model, task, frame, len(numbers)), facts
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    facts["edges"] = int(frame["edge_index"].shape[1])
    if task.get("mode") == "aot":
        model, frame = _compile_ahead(model, frame, device_of(task))
    return lambda: model(dict(frame)), facts


def _model(task):
    from nequip.model import NequIPGNNModel

    m = task["model"]
    return NequIPGNNModel(
        seed=0,
        model_dtype="float32",
        type_names=["H", "O"],
        r_max=m["cutoff"],
        num_bessels=8,
        num_layers=m["n_layers"],
        l_max=m["l_max"],
        num_features=m["n_channels"],
        parity=False,
        radial_mlp_depth=2,
        radial_mlp_width=64,
        avg_num_neighbors=m["avg_num_neighbors"],
        type_embed_num_features=m["n_channels"],
        compile_mode="compile" if task.get("mode") == "compile" else "eager",
    )


def _compile_ahead(model, frame, device):
    """What ``nequip-compile --mode aotinductor --target ase`` makes, and the inputs that it takes."""
    from nequip.nn.compile import DictInputOutputWrapper
    from nequip.scripts._compile_utils import ASE_TARGET
    from nequip.utils.aot import aot_export_model
    from torch.export import Dim

    frame = ASE_TARGET["data_settings"](dict(frame))
    sizes = {
        "graph": Dim.STATIC,
        "node": Dim("num_nodes", min=2, max=2**30),
        "edge": Dim("num_edges", min=2, max=2**30),
    }
    with tempfile.NamedTemporaryFile(suffix=".nequip.pt2", delete=False) as file:
        path = file.name
    fields = (ASE_TARGET["input"], ASE_TARGET["output"])
    aot_export_model(model, device.type, *fields, frame, ASE_TARGET["batch_map_settings"](sizes), path)
    compiled = DictInputOutputWrapper(torch._inductor.aoti_load_package(path), *fields)
    return compiled, {key: frame[key] for key in fields[0]}


def _frame(task, numbers, positions, length):
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_dict

    frame = from_dict(
        {
            "pos": torch.tensor(positions),
            "cell": torch.eye(3, dtype=torch.float64) * (length or 100.0),
            "pbc": torch.tensor([length is not None] * 3),
            "atom_types": torch.from_numpy((numbers == 8).astype(np.int64)),
        }
    )
    compute_neighborlist_(frame, r_max=task["model"]["cutoff"])
    return AtomicDataDict.to_(frame, device_of(task))


def _training_step(model, task, frame, n_atoms):
    from nequip.data import AtomicDataDict

    batch = AtomicDataDict.batched_from_list([dict(frame) for _ in range(task["batch"])])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    model.train()

    def call():
        optimizer.zero_grad()
        out = model(dict(batch))
        ((out["total_energy"] / n_atoms).square().mean() + out["forces"].square().mean()).backward()
        optimizer.step()

    return call


def _ase_call(model, task, numbers, positions, length):
    from ase import Atoms
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper

    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    atoms = Atoms(numbers, positions, cell=[length] * 3 if length else None, pbc=length is not None)
    mapper = ChemicalSpeciesToAtomTypeMapper(model_type_names=["H", "O"])
    moves = iter(np.random.default_rng(0).normal(scale=0.003, size=(20_000, *positions.shape)))

    def call():  # what nequip's ASE calculator does
        atoms.positions = positions + next(moves)
        data = mapper(from_ase(atoms))
        compute_neighborlist_(data, r_max=task["model"]["cutoff"])
        model(AtomicDataDict.to_(data, device_of(task)))["forces"].cpu().numpy()

    return call


serve(setup)
