"""Part 4: frames a second of one step of training on energies and forces, of both families."""

from functools import partial
from typing import Any

import torch

from gpu_parts.runner import Case
from gpu_parts.systems import Options, backends, batch_graph, make_potential
from gpu_parts.timing import measure


def cases(options: Options) -> list[Case]:
    """Batches of molecules and of boxes, by every backend."""
    return [
        Case({"model": name, "batch": f"{frames} x {atoms} atoms", "backend": backend}, partial(_step, *what))
        for frames, atoms, periodic in options.sizes.batches
        for name, settings in options.sizes.models.items()
        for backend in backends(options, settings["family"])
        for what in [(options, settings, (frames, atoms, periodic), backend)]
    ]


def _step(options: Options, settings: dict[str, Any], batch: tuple[int, int, bool], backend: str) -> dict[str, Any]:
    """Prediction, loss, its gradient by the weights, one step of Adam; labels are zero, and the rate is small."""
    potential = make_potential(settings, options.device).train()
    potential.kernel_backend = backend  # pyright: ignore
    graph = batch_graph(*batch, potential.cutoff, options.device)
    optimizer = torch.optim.Adam(potential.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        prediction = potential.predict_trainable(graph)
        ((prediction.energy / batch[1]).square().mean() + prediction.forces.square().mean()).backward()
        optimizer.step()

    timing = measure(step, options.device, options.sizes.block_seconds)
    if not all(bool(p.isfinite().all()) for p in potential.parameters()):
        raise FloatingPointError("weights are not finite after these steps")
    return timing | {"frames_per_s": 1e3 * batch[0] / timing["ms"], "edges": graph.n_edges}
