"""The load-time guards: gradient, stress, precision, neighbours, symmetry; on small structures.

They catch what has gone wrong in this field without a sound: kernels whose forces are not the gradient, neighbour lists
that miss images, models that jump when a list is rebuilt. They run on the installation and the weights at hand.
"""

import copy
import itertools
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from equimd import kernels, neighbors
from equimd.errors import KernelWarning
from equimd.graph import AtomGraph, batch_graphs, edge_vectors, make_graph
from equimd.kernels.ambient import in_plain_torch
from equimd.models.elements import COVALENT_RADII
from equimd.models.potential import Potential, Prediction
from equimd.rotations import random_rotations, rotate_back_vectors, rotate_vectors

# Everything but PRECISION is compared in float64. Truncation of a central difference with this step (Å) is 1e-9 to 1e-5
# of the scale, the latter for networks that are strained where they were never trained; rounding is 1e-9. Both are far
# from wrong gradients, which are off by per cents.
_STEP = 1e-5
_GRADIENT = 1e-4
# Coefficients that were rounded to float32 once leave 1e-7.
_SYMMETRY = 1e-5
# Other order of summation: 1e-13. Edges beyond the cutoff weigh exactly nothing.
_EXACT = 1e-8
# Against the reference in float64, for a sound kernel: 1e-6 to 1e-4 in float32 (atomic energies nearly cancel), 1e-10
# in float64, where radial weights come from a table. A broken one is off by per cents.
_PRECISION = {torch.float32: 5e-3, torch.float64: 1e-6}
# Gradients of a loss, in float32, with radial functions interpolated between knots: 1e-6 to 1e-4 for random weights,
# up to 8e-4 for trained ones. A second derivative that is half of what it should be: 8e-3 and more.
_TRAINING = 4e-3
# Smallest scale of forces (eV/Å), so that a potential that is flat everywhere passes.
_FLOOR = 1e-4
# Smallest mean square of energies, forces and stress that is a scale: of forces, (meV/Å)².
_SMALL_SQUARE = 1e-6


class SelfCheckError(RuntimeError):
    """A potential, a kernel or the neighbour search contradicts itself."""


@dataclass(frozen=True)
class SelfCheckReport:
    """What was found: ``messages`` has a line for each guard that failed, ``deviations`` the number behind each guard.

    Deviations of forces and energies are relative to the largest force or the sum of |atomic energies|.
    """

    ok: bool
    messages: tuple[str, ...]
    deviations: dict[str, float] = field(default_factory=dict)

    def raise_if_failed(self) -> None:
        """Raise SelfCheckError with all messages in one line."""
        if not self.ok:
            raise SelfCheckError("self-check failed: " + "; ".join(self.messages))


@in_plain_torch
def self_check(potential: Potential) -> SelfCheckReport:
    """Check the potential, as it is loaded, on a small periodic structure of its own species.

    The weights are not touched: everything runs on a float64 copy and the reference kernels, and the precision guard
    compares the potential as it is, with the kernels it uses, to that. Where the fastest kernels fail, slower ones
    are tried, kept for this potential, and named in a warning. A potential with direct forces is not asked for
    a gradient; only family "equivariant" is asked for rotational symmetry.
    """
    structure = _small_structure(potential.species, potential.cutoff)
    deviations: dict[str, float] = {}
    messages = _check_neighbors(structure, potential.cutoff)
    double = copy.deepcopy(potential).to(torch.float64).eval().requires_grad_(False)
    with kernels.using("reference"):
        predictions = _Variants(structure, potential.family == "equivariant").evaluate(double)
        gradient, stress = _finite_differences(double, structure, predictions["base"])
    base = predictions["base"]
    scale = max(float(base.forces.abs().max()), _FLOOR)
    precision = _choose_kernels(potential, double, [_close_pair(potential.species), structure])

    def guard(name: str, deviation: float, tolerance: float, what: str) -> None:
        deviations[name] = deviation
        if not deviation <= tolerance:  # NaN fails
            messages.append(f"{what} (relative deviation {deviation:.2g}, accepted {tolerance:g})")

    guard(
        "precision",
        precision,
        _PRECISION[potential.dtype],
        f"predictions in {str(potential.dtype).removeprefix('torch.')} are not those of the reference in float64",
    )
    if not potential.direct_forces:
        guard("gradient", gradient / scale, _GRADIENT, "forces are not the gradient of the energy")
    guard("stress", stress, _GRADIENT, "stress is not the strain derivative of the energy")
    for name, what in _Variants.meaning.items():
        if name in predictions:
            energy = _largest(predictions[name].energies - base.energies) / _energy_scale(base)
            tolerance = _SYMMETRY if name in ("rotation", "inversion") else _EXACT
            forces = _largest(predictions[name].forces - base.forces) / scale
            guard(name, float(np.max([energy, forces])), tolerance, what)
    return SelfCheckReport(not messages, tuple(messages), deviations)


@in_plain_torch
def check_training_kernels(potential: Potential) -> None:
    """Compare the gradient of a loss with that of the reference kernels; use slower kernels, with a warning, if wrong.

    The loss is of energy, forces and stress of a small structure; deviations are relative to the largest gradient of
    the same parameter, or to a hundredth of the largest of all.
    """
    if not (potential.trains_by_kernels or potential.has_compiled_layers):
        return  # torch's own operations do it
    graph = _on(potential, _small_structure(potential.species, potential.cutoff).graph(potential.cutoff + 0.5))
    double = copy.deepcopy(potential).to(torch.float64)
    with kernels.using("reference"):
        wanted = _loss_gradient(double, graph)
    floor = max(_FLOOR, 0.01 * max(_largest(gradient) for gradient in wanted))
    scales = [max(_largest(gradient), floor) for gradient in wanted]
    found: dict[kernels.Backend, str] = {}
    for backend in ("auto", "llvm", "reference") if potential.device.type == "cpu" else ("auto", "reference"):
        potential.kernel_backend = backend
        try:
            own = _loss_gradient(potential, graph)
            errors = [_largest(a.to(b) - b) / scale for a, b, scale in zip(own, wanted, scales, strict=True)]
            deviation = float(np.max(errors))  # NaN if any is
        except Exception as error:  # a compiler may fail in any way
            if backend == "reference":
                raise
            found[backend] = f"{type(error).__name__}: {error}"
            continue
        if deviation <= _TRAINING:
            break
        found[backend] = f"gradients are off by {deviation:.2g} of the largest"
    else:  # it is not the kernels
        potential.kernel_backend = "auto"
        warnings.warn(
            f"gradients of a loss differ from those in float64 ({found['reference']})", KernelWarning, stacklevel=2
        )
        return
    if found:
        _warn_of_kernels(found, potential.kernel_backend)


def _loss_gradient(potential: Potential, graph: AtomGraph) -> list[Tensor]:
    """Of a loss that depends on energy, forces and stress of a structure, by every trainable parameter.

    Each of the three is divided by its own size. The energies of random weights are large beside their forces, and
    would hide a fault of the second derivatives.
    """
    prediction = potential.predict_trainable(graph, stress=True)
    parts = [prediction.energies, prediction.forces, prediction.stress]
    squares = [part.square().mean() for part in parts if part is not None]
    loss = torch.stack([square / square.detach().clamp(min=_SMALL_SQUARE) for square in squares]).sum()
    parameters = [p for p in potential.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def _choose_kernels(potential: Potential, exact: Potential, structures: "list[_Structure]") -> float:
    """Use the fastest kernels that are right, in the potential and in what it wraps; the largest deviation left.

    ``exact`` is a float64 copy of it. Deviations are relative, of energies, forces and stress, structure by structure.
    """
    deviations = []
    for part, right in zip(potential.modules(), exact.modules(), strict=True):
        if isinstance(part, Potential) and isinstance(right, Potential):
            # Edges beyond the cutoff are there as in a Verlet list: none of the kernels may count them.
            batch = batch_graphs([s.graph(part.cutoff + 0.5) for s in structures])
            with kernels.using("reference"):
                wanted = right(_on(right, batch), stress=True)
            deviations.append(_choose_own_kernels(part, _on(part, batch), wanted))
    return float(np.max(deviations))  # NaN if any is


def _choose_own_kernels(potential: Potential, graph: AtomGraph, wanted: Prediction) -> float:
    found: dict[kernels.Backend, str] = {}
    deviation = float("nan")
    backends: tuple[kernels.Backend, ...] = ("auto", "llvm", "reference")
    for backend in backends if graph.positions.device.type == "cpu" else ("auto", "reference"):
        potential.kernel_backend = backend
        try:
            with torch.no_grad():
                deviation = _deviation(potential(graph, stress=True), wanted, graph)
        except Exception as error:  # a compiler may fail in any way
            if backend == backends[-1]:
                raise
            found[backend] = f"{type(error).__name__}: {error}"
            continue
        if deviation <= _PRECISION[potential.dtype]:
            break
        found[backend] = f"off by {deviation:.2g} of the largest value"
    else:  # it is not the kernels
        potential.kernel_backend = "auto"
        return deviation
    if found:
        _warn_of_kernels(found, potential.kernel_backend)
    return deviation


def _warn_of_kernels(found: "dict[kernels.Backend, str]", chosen: kernels.Backend) -> None:
    what = "; ".join(f'"{name}": {fault}' for name, fault in found.items())
    warnings.warn(
        f'compiled kernels are wrong here ({what}); "{chosen}" is used instead and is slower',
        KernelWarning,
        stacklevel=4,
    )


def _deviation(own: Prediction, wanted: Prediction, graph: AtomGraph) -> float:
    """Largest difference of energies, forces or stress, relative to the largest of the same structure."""
    errors = []
    for k in range(graph.n_systems):
        atoms = graph.batch == k
        pairs = [(own.energies[atoms], wanted.energies[atoms]), (own.forces[atoms], wanted.forces[atoms])]
        if own.stress is not None and wanted.stress is not None:
            pairs.append((own.stress[k], wanted.stress[k]))
        errors += [_largest(got.to(exact) - exact) / max(_largest(exact), _FLOOR) for got, exact in pairs]
    return float(np.max(errors))  # NaN if any is


@dataclass(frozen=True)
class _Structure:
    """A structure as arrays; see ``AtomGraph``."""

    positions: np.ndarray
    numbers: np.ndarray
    cell: np.ndarray

    def graph(self, cutoff: float) -> AtomGraph:
        edges, shifts = neighbors.neighbor_list(self.positions, self.cell, np.ones(3, dtype=bool), cutoff)
        return self.graph_of(edges, shifts)

    def graph_of(self, edges: np.ndarray, shifts: np.ndarray) -> AtomGraph:
        return make_graph(
            torch.tensor(self.positions),
            torch.tensor(self.numbers),
            torch.from_numpy(edges),
            torch.from_numpy(shifts),
            torch.tensor(self.cell),
            torch.ones(3, dtype=torch.bool),
        )


def _small_structure(species: tuple[int, ...], cutoff: float, n_atoms: int = 5) -> _Structure:
    """A few atoms about a bond length apart in a triclinic cell that is smaller than the sphere of the cutoff."""
    rng = np.random.default_rng(7)
    numbers = np.array([species[k % len(species)] for k in range(n_atoms)])
    radii = np.array(COVALENT_RADII)[numbers]
    length = 4.0 * 2 * float(radii.mean())
    cell = length * np.array([[1.2, 0.1, 0.0], [0.35, 1.1, 0.05], [-0.25, 0.3, 1.0]])
    images = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ cell
    placed: list[np.ndarray] = []
    spacing = 1.1
    while len(placed) < n_atoms:
        trial = rng.random(3) @ cell
        gaps = [np.linalg.norm(trial - other + images, axis=1).min() for other in placed]
        if all(gap > spacing * (radii[len(placed)] + radii[k]) for k, gap in enumerate(gaps)):
            placed.append(trial)
        spacing *= 0.999  # ends for any mixture of radii
    return _Structure(np.array(placed), numbers, cell)


def _close_pair(species: tuple[int, ...]) -> _Structure:
    """Two atoms well inside the reach of nuclear repulsion."""
    numbers = np.array([species[0], species[-1]])
    distance = 0.6 * float(np.array(COVALENT_RADII)[numbers].sum())
    positions = np.array([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]) * distance
    return _Structure(positions, numbers, 20.0 * np.array([[1.0, 0.0, 0.0], [0.1, 1.0, 0.0], [0.0, 0.2, 1.0]]))


def _check_neighbors(structure: _Structure, cutoff: float) -> list[str]:
    """The neighbour search against all images, right- and left-handed, partly periodic, atoms outside the cell."""
    rng = np.random.default_rng(3)
    away = structure.positions + rng.integers(-2, 3, size=structure.positions.shape) @ structure.cell
    mirrored = structure.cell[[1, 0, 2]]
    cases = {
        "a triclinic cell": (structure.positions, structure.cell, (True, True, True)),
        "a left-handed cell with atoms outside it": (away, mirrored, (True, True, True)),
        "a partly periodic cell": (away, structure.cell, (True, False, True)),
        "a cell that is not periodic": (structure.positions, structure.cell, (False, False, False)),
    }
    messages = []
    for name, (positions, cell, pbc) in cases.items():
        found = _as_set(*neighbors.neighbor_list(positions, cell, np.array(pbc), cutoff))
        wanted = brute_force_neighbors(positions, cell, np.array(pbc), cutoff)
        if found != wanted:
            messages.append(
                f"the neighbour list of {name} lacks {len(wanted - found)} and invents {len(found - wanted)} "
                f"of {len(wanted)} edges"
            )
    turn = random_rotations(2, seed=5, inversion=False).rotations[0]
    edges = _as_set(*neighbors.neighbor_list(structure.positions, structure.cell, np.ones(3, dtype=bool), cutoff))
    turned = neighbors.neighbor_list(
        rotate_vectors(structure.positions, turn), rotate_vectors(structure.cell, turn), np.ones(3, dtype=bool), cutoff
    )
    if _as_set(*turned) != edges:
        messages.append("the neighbour list changes when the structure is rotated")
    return messages


def brute_force_neighbors(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> set[tuple[int, ...]]:
    """Every (i, j, S_x, S_y, S_z) within the cutoff, by trying all images that could be near enough."""
    pbc = np.asarray(pbc, dtype=bool)
    spread = positions.max(axis=0) - positions.min(axis=0)
    reach = cutoff + float(np.linalg.norm(spread))
    ranges = [range(1)] * 3
    if pbc.any():
        periodic = cell[pbc]
        # Rows of the pseudo-inverse are the normals of the lattice planes over their spacing.
        inverse = np.linalg.pinv(periodic)
        bounds = np.ceil(reach * np.linalg.norm(inverse, axis=0)).astype(int)
        for axis, bound in zip(np.flatnonzero(pbc), bounds, strict=True):
            ranges[axis] = range(-bound, bound + 1)
    shifts = np.array(list(itertools.product(*ranges)))
    vectors = positions[None, None, :, :] - positions[None, :, None, :] + (shifts @ cell)[:, None, None, :]
    near = np.square(vectors).sum(axis=-1) <= cutoff**2
    own = np.flatnonzero((shifts == 0).all(axis=1))[0]
    near[own] &= ~np.eye(len(positions), dtype=bool)
    image, i, j = np.nonzero(near)
    return {(int(a), int(b), *map(int, shifts[s])) for s, a, b in zip(image, i, j, strict=True)}


def _as_set(edges: np.ndarray, shifts: np.ndarray) -> set[tuple[int, ...]]:
    return {(int(i), int(j), *map(int, s)) for i, j, s in zip(*edges, shifts, strict=True)}


class _Variants:
    """The same structure in disguises under which energy and (turned back) forces must not change."""

    meaning = {  # noqa: RUF012
        "translation": "predictions change when the structure is moved and atoms are wrapped",
        "permutation": "predictions change when atoms are listed in another order",
        "skin": "edges beyond the cutoff contribute",
        "rotation": "forces of an equivariant potential do not turn with the structure",
        "inversion": "forces of an equivariant potential do not follow a reflection",
    }

    def __init__(self, structure: _Structure, turned: bool) -> None:
        rng = np.random.default_rng(11)
        s, n = structure, len(structure.numbers)
        moved = (s.positions + rng.normal(size=3)) @ np.linalg.inv(s.cell)
        self.order = rng.permutation(n)
        self.structures = {
            "base": s,
            "translation": _Structure((moved - np.floor(moved)) @ s.cell, s.numbers, s.cell),
            "permutation": _Structure(s.positions[self.order], s.numbers[self.order], s.cell),
            "skin": s,
        }
        self.turns: dict[str, np.ndarray] = {}
        if turned:
            first, second = random_rotations(2, seed=13, inversion=False).rotations
            self.turns = {"rotation": first, "inversion": -second}
        for name, turn in self.turns.items():
            self.structures[name] = _Structure(
                rotate_vectors(s.positions, turn), s.numbers, rotate_vectors(s.cell, turn)
            )

    def evaluate(self, potential: Potential) -> dict[str, Prediction]:
        """Predictions by name, as one batch, turned and sorted back."""
        graphs = [s.graph(potential.cutoff + (0.5 if name == "skin" else 0.0)) for name, s in self.structures.items()]
        everything = potential(_on(potential, batch_graphs(graphs)), stress=True)
        n = len(self.order)
        back = np.argsort(self.order)
        out = {}
        for k, name in enumerate(self.structures):
            rows = slice(k * n, (k + 1) * n)
            energies, forces = everything.energies[rows], everything.forces[rows]
            if name == "permutation":
                energies, forces = energies[back], forces[back]
            if name in self.turns:
                forces = rotate_back_vectors(forces, torch.from_numpy(self.turns[name]).to(forces))
            stress = None if everything.stress is None else everything.stress[k : k + 1]
            out[name] = Prediction(everything.energy[k : k + 1], energies, forces, stress)
        return out


def _finite_differences(potential: Potential, structure: _Structure, base: Prediction) -> tuple[float, float]:
    """Largest disagreement of central differences with forces (eV/Å) and with the virial (relative).

    Along three random directions in the space of all coordinates, and along two random strains, not symmetric.
    """
    rng = np.random.default_rng(17)
    moves = rng.normal(size=(3, *structure.positions.shape))
    moves /= np.linalg.norm(moves, axis=(1, 2), keepdims=True)
    strains = rng.normal(size=(2, 3, 3))
    strains /= np.linalg.norm(strains, axis=(1, 2), keepdims=True)
    edges, shifts = neighbors.neighbor_list(
        structure.positions, structure.cell, np.ones(3, dtype=bool), potential.cutoff + 0.1
    )
    graphs = []
    for sign in (_STEP, -_STEP):
        displaced = [_Structure(structure.positions + sign * m, structure.numbers, structure.cell) for m in moves]
        for strain in strains:
            deform = np.eye(3) + sign * strain
            displaced.append(_Structure(structure.positions @ deform, structure.numbers, structure.cell @ deform))
        graphs += [s.graph_of(edges, shifts) for s in displaced]
    graph = _on(potential, batch_graphs(graphs))
    with torch.no_grad():
        energies = potential.atomic_energies(graph, edge_vectors(graph, torch.float64))
    total = energies.view(2, len(moves) + len(strains), -1).sum(-1).cpu().numpy()
    slopes = (total[0] - total[1]) / (2 * _STEP)
    forces = base.forces.cpu().numpy()
    force_error = np.abs(slopes[: len(moves)] + (moves * forces).sum(axis=(1, 2))).max()
    assert base.stress is not None
    virial = abs(np.linalg.det(structure.cell)) * base.stress[0].cpu().numpy()
    strain_error = np.abs(slopes[len(moves) :] - (strains * virial).sum(axis=(1, 2))).max()
    return float(force_error), float(strain_error / max(np.abs(virial).max(), _FLOOR))


def _energy_scale(prediction: Prediction) -> float:
    return max(float(prediction.energies.abs().sum()), _FLOOR)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _on(potential: Potential, graph: AtomGraph) -> AtomGraph:
    return graph.to(potential.device)  # type: ignore[return-value]
