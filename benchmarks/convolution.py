"""The convolution at the size of the benchmarks, and contestants that take turns."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equimd.kernels import ConvolutionPlan, Topology, make_topology
from equimd.kernels.harmonics import spherical_harmonics

N_ATOMS, LENGTH, CUTOFF, N_CHANNELS = 192, 12.4, 5.0, 32  # Å; the density of water


@dataclass(frozen=True)
class Problem:
    """Arguments of one convolution: x (N, D_in, C), sh (E, (l_max+1)²), radial (E, P, C), gradient (N, D_out, C)."""

    plan: ConvolutionPlan
    x: Tensor
    sh: Tensor
    radial: Tensor
    gradient: Tensor
    topology: Topology

    @property
    def floats(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the convolution is differentiated by."""
        return self.x, self.sh, self.radial


def make_problem(plan: ConvolutionPlan) -> Problem:
    """192 atoms at random places of a periodic box, every pair within 5 Å; random features and weights, float32."""
    rng = np.random.default_rng(0)
    positions = rng.random((N_ATOMS, 3)) * LENGTH
    vectors = positions[None] - positions[:, None]
    vectors -= LENGTH * np.round(vectors / LENGTH)
    distances = np.linalg.norm(vectors, axis=2)
    receivers, senders = np.nonzero((distances < CUTOFF) & (distances > 0))
    directions = torch.from_numpy(vectors[receivers, senders] / distances[receivers, senders, None])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, N_CHANNELS, generator=generator)

    return Problem(
        plan,
        random(N_ATOMS, plan.dim_in).requires_grad_(),
        spherical_harmonics(directions, plan.l_max_sh).float().requires_grad_(),
        random(len(senders), plan.n_paths).requires_grad_(),
        random(N_ATOMS, plan.dim_out),
        make_topology(torch.from_numpy(senders), torch.from_numpy(receivers), N_ATOMS),
    )


def take_turns(
    calls: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 8
) -> dict[str, dict[str, float]]:
    """Times of each call, over rounds of a few calls each in turn, so that what else the machine does hurts all alike.

    ms is the median of the rounds' medians, spread their (highest − lowest)/median, best the ms of the fastest call.
    ``seconds`` is what each contestant gets, after two calls to warm up.
    """
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = int(np.clip(seconds / rounds / max(_seconds(call), 1e-6), 1, 200))
    medians: dict[str, list[float]] = {name: [] for name in calls}
    best = dict.fromkeys(calls, np.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            samples = [_seconds(call) for _ in range(counts[name])]
            medians[name].append(float(np.median(samples)))
            best[name] = min(best[name], *samples)
    results = {}
    for name, values in medians.items():
        low, middle, high = np.percentile(values, [0, 50, 100]).tolist()
        results[name] = {"ms": 1e3 * middle, "spread": (high - low) / middle, "best": 1e3 * best[name]}
    return results


def written(timing: Mapping[str, float]) -> str:
    """A median for a table, marked where rounds differed by more than a fifth."""
    ms = f"{timing['ms']:#.3g}" if timing["ms"] < 100 else f"{timing['ms']:,.0f}"
    return ms + (" (unstable)" if timing["spread"] > 0.2 else "")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
