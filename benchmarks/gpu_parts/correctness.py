"""Part 2: every way on the device against the reference on the CPU in float64: convolutions, potentials, checks."""

import functools
import warnings
from functools import partial
from typing import Any, cast

import torch
from ase import Atoms
from ase.io import read
from torch import Tensor

from equimd import kernels
from equimd.models.checkpoint import find_potential, list_potentials, load_potential
from equimd.models.potential import Potential, Prediction
from equimd.models.selfcheck import self_check
from gpu_parts.runner import Case
from gpu_parts.systems import Options, automatic, backends, box, convolution_backends, graph_of, make_potential

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# ‖a − b‖ / ‖b‖ of sums of some hundred products, and of the derivatives of such: rounding leaves about 1e-6 and 1e-15;
# products in TF32 would leave 3e-4, one wrong coefficient more than 1e-3.
CONVOLUTION = {"float32": 1e-5, "float64": 1e-12}
# Atomic energies, forces and stress of a network; layers add up, and atomic energies nearly cancel. In float64 the
# bound is for radial tables as there are on a CPU; without, 1e-13 is left.
POTENTIAL = {"float32": 2e-5, "float64": 1e-8}
# Second derivatives of the same; where radial functions are interpolated in training, that leaves up to 1e-4.
GRADIENT = {"float32": 2e-4, "float64": 1e-8}
N_ATOMS = 64


def cases(options: Options) -> list[Case]:
    """In each precision checks on loading, potentials of random weights and shipped ones, and single convolutions."""
    shipped = list_potentials()
    if options.quick:
        shipped = [name for name in shipped if name.endswith("transformer")][:1]
    names = [*options.sizes.models, *shipped]
    found = []
    for dtype in DTYPES:
        for name in names:
            label = {"check": "load-time self-check", "of": name, "dtype": dtype}
            found.append(Case(label, partial(_load, options, name, dtype)))
        for name in names:
            for backend in backends(options, _family(options, name)):
                label = {"check": "potential", "of": name, "dtype": dtype, "backend": backend}
                found.append(Case(label, partial(_compare_potential, options, name, dtype, backend)))
        for name in options.sizes.models:
            for backend in backends(options, _family(options, name)):
                label = {"check": "gradient of a loss", "of": name, "dtype": dtype, "backend": backend}
                found.append(Case(label, partial(_compare_gradient, options, name, dtype, backend)))
        for l_max, parity in options.sizes.layers:
            for n_channels in options.sizes.channels:
                for backend in convolution_backends(options):
                    of = f"l_max {l_max}{', both parities' * parity}, {n_channels} channels"
                    label = {"check": "convolution", "of": of, "dtype": dtype, "backend": backend}
                    call = partial(_compare_convolution, options, (l_max, parity), n_channels, dtype, backend)
                    found.append(Case(label, call))
    return found


def _judged(deviations: dict[str, float], bound: float) -> dict[str, Any]:
    return {**deviations, "bound": bound, "passed": all(value <= bound for value in deviations.values())}  # NaN fails


def _deviation(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; ‖a‖ where the reference is zero everywhere."""
    exact = b.detach().to(torch.float64).cpu()
    difference = (a.detach().to(torch.float64).cpu() - exact).norm()
    return float(difference / exact.norm()) if exact.any() else float(difference)


# --- convolutions ----------------------------------------------------------------------------------------------------


def _compare_convolution(
    options: Options, layer: tuple[int, bool], n_channels: int, dtype: str, backend: kernels.Backend
) -> dict[str, Any]:
    """The convolution, its gradients, and theirs, on the same random numbers."""
    plan = kernels.make_layer_plan(*layer)
    generator = torch.Generator().manual_seed(3)
    n_edges, n_atoms = options.sizes.n_edges, options.sizes.n_edges // 10
    shapes = [(n_atoms, plan.dim_in, n_channels), (n_edges, plan.dim_sh), (n_edges, plan.n_paths, n_channels)]
    shapes += [(n_atoms, plan.dim_out, n_channels), *shapes]  # what multiplies the output, and its gradients
    # Numbers of the lower precision, so that rounding them is no part of the difference.
    arrays = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in shapes]
    edges = [torch.randint(0, n_atoms - 1, (n_edges,), generator=generator) for _ in range(2)]  # the last has none
    own = _orders([a.to(options.device) for a in arrays], [e.to(options.device) for e in edges], plan, backend)
    exact = _orders([a.to(torch.float64) for a in arrays], edges, plan, "reference")
    deviations = {name: max(_deviation(a, b) for a, b in zip(own[name], exact[name], strict=True)) for name in exact}
    return _judged(deviations, CONVOLUTION[dtype])


def _orders(
    arrays: list[Tensor], edges: list[Tensor], plan: kernels.ConvolutionPlan, backend: kernels.Backend
) -> dict[str, list[Tensor]]:
    """The output; the gradients of <g, output> by x, harmonics and weights; those of <h, gradients> by all and g."""
    floats, g, directions = [a.requires_grad_() for a in arrays[:3]], arrays[3].requires_grad_(), arrays[4:]
    out = kernels.convolve(floats[0], floats[1], floats[2], edges[0], edges[1], plan, backend=backend)
    first = torch.autograd.grad((out * g).sum(), floats, create_graph=True)
    product = sum((gradient * h).sum() for gradient, h in zip(first, directions, strict=True))
    second = torch.autograd.grad(cast(Tensor, product), [*floats, g])
    return {"forward": [out], "first": list(first), "second": list(second)}


# --- potentials ------------------------------------------------------------------------------------------------------


def _family(options: Options, name: str) -> str:
    settings = options.sizes.models.get(name)
    return settings["family"] if settings else name.rpartition("-")[2]


def _potential(options: Options, name: str, device: str, dtype: str) -> Potential:
    settings = options.sizes.models.get(name)
    if settings is None:
        potential = load_potential(name, device=device, dtype=dtype)
    else:
        potential = make_potential(settings, device, DTYPES[dtype])
    return potential.eval().requires_grad_(False)


def _structure(options: Options, name: str) -> Atoms:
    """Where a shipped potential begins, a little displaced; a box for those of random weights."""
    if name in options.sizes.models:
        return box(27 if options.quick else N_ATOMS)
    atoms = cast(Atoms, read(find_potential(name) / "start.xyz"))
    atoms.rattle(0.03, seed=1)
    return atoms


@functools.cache
def _exact(options: Options, name: str) -> Prediction:
    """Of the reference on the CPU in float64."""
    potential, atoms = _potential(options, name, "cpu", "float64"), _structure(options, name)
    with kernels.using("reference"):
        return potential(graph_of(atoms, potential.cutoff), stress=bool(atoms.pbc.any()))


def _compare_potential(options: Options, name: str, dtype: str, backend: kernels.Backend) -> dict[str, Any]:
    potential, atoms = _potential(options, name, options.device, dtype), _structure(options, name)
    potential.kernel_backend = backend
    graph = graph_of(atoms, potential.cutoff).to(options.device)
    own = potential(graph, stress=bool(atoms.pbc.any()))  # pyright: ignore
    exact = _exact(options, name)
    deviations = {
        "energy": abs(float(own.energy) - float(exact.energy)) / float(exact.energies.abs().sum()),
        "energies": _deviation(own.energies, exact.energies),
        "forces": _deviation(own.forces, exact.forces),
    }
    if own.stress is not None and exact.stress is not None:
        deviations["stress"] = _deviation(own.stress, exact.stress)
    return _judged(deviations, POTENTIAL[dtype])


def _compare_gradient(options: Options, name: str, dtype: str, backend: kernels.Backend) -> dict[str, Any]:
    """Of a loss of energies, forces and stress, by all weights, as in training."""
    gradients = []
    for device, precision, chosen in ((options.device, dtype, backend), ("cpu", "float64", "reference")):
        potential = _potential(options, name, device, precision).train().requires_grad_(True)
        potential.kernel_backend = cast(kernels.Backend, chosen)
        graph = graph_of(_structure(options, name), potential.cutoff).to(device)
        prediction = potential.predict_trainable(graph, stress=True)  # pyright: ignore
        assert prediction.stress is not None
        loss = prediction.energies.square().sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
        found = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.detach().to("cpu", torch.float64).flatten() for g in found]))
    return _judged({"weights": _deviation(*gradients)}, GRADIENT[dtype])


def _load(options: Options, name: str, dtype: str) -> dict[str, Any]:
    """What a calculator does when it loads a potential: the check must pass, and leave the fastest kernels in place."""
    potential = _potential(options, name, options.device, dtype)
    with kernels.using(automatic(options)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = self_check(potential)
    figures: dict[str, Any] = {name: float(value) for name, value in report.deviations.items()}
    notes = [*report.messages, *(str(w.message) for w in caught if issubclass(w.category, RuntimeWarning))]
    figures |= {"error": "; ".join(notes)} if notes else {}
    return figures | {"passed": report.ok and potential.kernel_backend == "auto"}
