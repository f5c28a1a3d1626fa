"""Part 3: energy, forces, stress of both families at three sizes; steps of MD; where the time goes; torch.compile."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ase import Atoms
from torch import Tensor

from equimd import kernels
from equimd.analysis.throughput import TimingSettings, measure_throughput
from equimd.calculators.ase import EquimdCalculator
from equimd.graph import AtomGraph
from equimd.models.potential import Potential
from gpu_parts.runner import Case
from gpu_parts.systems import Options, automatic, backends, box, box_graph, make_potential, molecule
from gpu_parts.timing import measure

PRECISIONS = ("highest", "high", "medium")
"""Of products of float32 matrices, in torch's words: float32; on a GPU "high" is TF32, and "medium" at most that."""

LONGEST = 16
"""How many operations are named."""


def cases(options: Options) -> list[Case]:
    """Every backend at full precision, and the first of them at lower ones; edges are given, as between two lists."""
    found = []
    for n_atoms in options.sizes.atoms:
        for name, settings in options.sizes.models.items():
            compared = backends(options, settings["family"])
            for backend, precision in [(b, PRECISIONS[0]) for b in compared] + [
                (compared[0], p) for p in PRECISIONS[1:]
            ]:
                label = {"model": name, "atoms": n_atoms, "backend": backend, "matrix_products": precision}
                found.append(Case(label, partial(_evaluation, options, settings, n_atoms, backend, precision)))
    return found


def md_cases(options: Options) -> list[Case]:
    """Velocity Verlet through ASE with a Verlet list, from a start that has settled a little."""
    return [
        Case({"model": name, "atoms": n_atoms}, partial(_md, options, settings, n_atoms))
        for n_atoms in options.sizes.md
        for name, settings in options.sizes.models.items()
    ]


def profile_cases(options: Options) -> list[Case]:
    """What an evaluation consists of, by torch's profiler."""
    return [
        Case({"model": name, "atoms": n_atoms}, partial(_profile, options, settings, n_atoms))
        for n_atoms in options.sizes.atoms[:2]
        for name, settings in options.sizes.models.items()
    ]


def compile_cases(options: Options) -> list[Case]:
    """Networks through torch.compile; autograd makes forces of what is compiled, once for each size."""
    compiler = "eager" if options.quick else "inductor"
    found = []
    for n_atoms in options.sizes.atoms[:2]:
        for name, settings in options.sizes.models.items():
            for backend in backends(options, settings["family"]):
                if backend not in (automatic(options), "reference"):
                    continue
                label = {"model": name, "atoms": n_atoms, "backend": backend, "compiler": compiler}
                found.append(Case(label, partial(_compiled, options, settings, n_atoms, backend, compiler)))
    return found


def _setup(options: Options, settings: dict[str, Any], n_atoms: int, backend: str) -> tuple[Potential, AtomGraph]:
    potential = make_potential(settings, options.device).eval().requires_grad_(False)
    potential.kernel_backend = backend  # pyright: ignore
    return potential, box_graph(n_atoms, potential.cutoff, options.device)


def _timed(options: Options, graph: AtomGraph, call: Callable[[], Any]) -> dict[str, Any]:
    timing = measure(call, options.device, options.sizes.block_seconds)
    rate = 1e3 * graph.n_atoms / timing["ms"]
    return timing | {"atom_steps_per_s": rate, "edges": graph.n_edges}


@functools.cache
def _exact_forces(options: Options, key: str, n_atoms: int) -> Tensor:
    """In float64, on the device."""
    settings = options.sizes.models[key]
    potential = make_potential(settings, options.device, torch.float64).eval().requires_grad_(False)
    with kernels.using(automatic(options)):
        return potential(box_graph(n_atoms, potential.cutoff, options.device)).forces


def _force_error(options: Options, settings: dict[str, Any], n_atoms: int, forces: Tensor) -> dict[str, Any]:
    """Root mean square difference from float64, relative to the forces, where there is memory for it."""
    key = next(name for name, known in options.sizes.models.items() if known is settings)
    try:
        exact = _exact_forces(options, key, n_atoms)
    except torch.OutOfMemoryError:
        return {"note": "out of memory in float64"}
    return {"relative_force_error": float((forces.to(exact) - exact).norm() / exact.norm())}


def _evaluation(
    options: Options, settings: dict[str, Any], n_atoms: int, backend: str, precision: str
) -> dict[str, Any]:
    potential, graph = _setup(options, settings, n_atoms, backend)
    torch.set_float32_matmul_precision(precision)
    try:
        forces = potential(graph).forces
        timing = _timed(options, graph, lambda: potential(graph, stress=True))
        without = measure(lambda: potential(graph), options.device, options.sizes.block_seconds / 3)
    finally:
        torch.set_float32_matmul_precision("highest")
    return timing | {"ms_without_stress": without["ms"]} | _force_error(options, settings, n_atoms, forces)


def _profile(options: Options, settings: dict[str, Any], n_atoms: int) -> dict[str, Any]:
    """ms of the operations that take longest, on the GPU or on the way to it; what they launch may count twice."""
    potential, graph = _setup(options, settings, n_atoms, automatic(options))
    parts = potential.profile(graph, repeats=2 if options.quick else 10)
    longest = list(parts.items())[:LONGEST]
    return {"longest": {name[:80]: 1e3 * seconds for name, seconds in longest}}


def _compiled(options: Options, settings: dict[str, Any], n_atoms: int, backend: str, compiler: str) -> dict[str, Any]:
    potential, graph = _setup(options, settings, n_atoms, backend)
    torch._dynamo.reset()
    potential(graph)  # what is derived from the edges alone is kept, and not compiled
    potential.network = torch.compile(potential.network, backend=compiler, dynamic=False)  # pyright: ignore
    forces = potential(graph).forces
    timing = _timed(options, graph, lambda: potential(graph, stress=True))
    return timing | _force_error(options, settings, n_atoms, forces)


def _md(options: Options, settings: dict[str, Any], n_atoms: int) -> dict[str, Any]:
    start: Atoms = molecule(n_atoms) if n_atoms < 64 else box(n_atoms)
    potential = make_potential(settings, options.device)
    seconds = options.sizes.block_seconds
    lengths = TimingSettings(warmup_steps=1 if options.quick else 20, warmup_seconds=3 * seconds, block_seconds=seconds)
    with kernels.using(automatic(options)):
        calculator = EquimdCalculator(potential, device=options.device, self_check=False)
        result = measure_throughput(calculator, start, settings=lengths)
    figures = {"ms": result.ms_per_step.median, "spread": result.ms_per_step.spread, "ns_per_day": result.ns_per_day}
    figures["ms_per_evaluation"] = result.ms_per_forward.median
    figures["atom_steps_per_s"] = n_atoms * result.steps_per_s
    return figures
