"""The shipped contract: oracles and checks that outside potentials and calculators can run, too.

``check_calculator`` and ``check_potential`` raise AssertionError with a line that says what does not hold.
``AnisotropicMock`` is a force field whose equivariance error is known in closed form.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes, all_properties
from ase.calculators.lj import LennardJones
from scipy.special import eval_legendre

from equimd.errors import InputError

if TYPE_CHECKING:
    from equimd.graph import AtomGraph
    from equimd.models.potential import Potential

# A unit vector in no symmetry direction of the grids.
_AXIS = np.array([0.36, 0.48, 0.80])


class AnisotropicMock(Calculator):
    """Lennard-Jones plus multipole fields of l = 1, 2, 3 fixed in space, whose spread over rotations is closed-form.

    E = E_LJ + Σ_l c_l Σ_i Z_i r_i^l P_l(n·r̂_i), with r_i from the centroid, Z_i the atomic number, n a fixed axis and
    c_l in eV/Å^l. Solid harmonics of different l are orthogonal over the group and
    ⟨∇R_l(r_i)·∇R_l(r_j)⟩ = l (r_i r_j)^(l−1) P_(l−1)(cos γ_ij); their parity under inversion is (−1)^l. The forces are
    the exact gradient. Molecules only.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, coefficients: Sequence[float] = (2e-3, 1e-3, 5e-4), **lennard_jones: float) -> None:
        super().__init__()
        if len(coefficients) != 3:
            raise InputError(f"coefficients has {len(coefficients)} values; expected 3, for l = 1, 2, 3")
        self.coefficients = tuple(float(c) for c in coefficients)
        self._lennard_jones = LennardJones(**({"sigma": 1.0, "epsilon": 0.05, "rc": 12.0} | lennard_jones))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Energy (eV) and forces (N, 3) in eV/Å."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        structure: Atoms = self.atoms.copy()
        if structure.pbc.any():
            raise InputError("AnisotropicMock was given a periodic structure; accepted are molecules")
        forces = self._lennard_jones.get_forces(structure)
        energy = float(self._lennard_jones.results["energy"])
        r, z = _from_centroid(structure)
        t, r2 = r @ _AXIS, (r * r).sum(-1)
        c1, c2, c3 = self.coefficients
        energy += float(z @ (c1 * t + c2 * (3 * t**2 - r2) / 2 + c3 * (5 * t**3 - 3 * r2 * t) / 2))
        along_axis = c1 + c2 * 3 * t + c3 * (15 * t**2 - 3 * r2) / 2
        along_r = -c2 - c3 * 3 * t
        gradient = z[:, None] * (along_axis[:, None] * _AXIS + along_r[:, None] * r)
        self.results = {"energy": energy, "forces": forces - (gradient - gradient.mean(0))}

    def spread_by_degree(self, atoms: Atoms) -> dict[int, np.ndarray]:
        """Closed form of ∫|a_i − ā_i|² (N,) in (eV/Å)² that degree l contributes, for l = 1, 2, 3."""
        r, z = _from_centroid(atoms)
        out = {}
        for degree, c in enumerate(self.coefficients, start=1):
            covariance = c**2 * np.outer(z, z) * degree * _solid(r, degree - 1)
            out[degree] = np.diag(covariance) - 2 * covariance.mean(1) + covariance.mean()
        return out

    def spread(self, atoms: Atoms) -> np.ndarray:
        """Closed form of ∫|a_i − ā_i|² (N,) in (eV/Å)²: what ``Decomposition.spread`` must be."""
        return np.sum(list(self.spread_by_degree(atoms).values()), axis=0)

    def spectrum(self, atoms: Atoms) -> dict[tuple[int, int], float]:
        """Closed form of the character spectrum: {(λ, parity): power summed over atoms, (eV/Å)²}."""
        return {(degree, (-1) ** degree): float(s.sum()) for degree, s in self.spread_by_degree(atoms).items()}

    def energy_variance(self, atoms: Atoms) -> float:
        """Closed form of the variance of the total energy over rotations, eV²."""
        r, z = _from_centroid(atoms)
        return sum(c**2 * float(z @ _solid(r, k) @ z) / (2 * k + 1) for k, c in enumerate(self.coefficients, start=1))


def _from_centroid(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    return atoms.positions - atoms.positions.mean(0), atoms.numbers.astype(float)


def _solid(r: np.ndarray, degree: int) -> np.ndarray:
    """(r_i r_j)^l P_l(cos γ_ij) (N, N), also where an atom sits at the centroid."""
    lengths = np.linalg.norm(r, axis=1)
    products = np.outer(lengths, lengths)
    cosines = np.divide(r @ r.T, products, out=np.zeros_like(products), where=products > 0)
    return products**degree * eval_legendre(degree, np.clip(cosines, -1.0, 1.0))


def check_calculator(calculator: Any, atoms: Atoms, force_tolerance: float = 1e-3) -> None:
    """Assert what every simulation relies on; any ASE calculator should pass.

    Keys, types and shapes of the results; the input is not changed; results follow the positions; one atom alone is
    handled; a translation (for periodic structures by a lattice vector of one atom, too) and a permutation of the atoms
    change nothing else; forces are minus the gradient of the energy. Rotations are not checked: measure them with
    ``equivariance_error``.

    Args:
        calculator: Any ASE calculator.
        atoms: A structure with forces that are not zero, of elements that the calculator knows.
        force_tolerance: Largest allowed |F + dE/dx| in eV/Å by central differences; the default suits float32.
    """
    before = atoms.copy()
    energy, forces = _energy_and_forces(calculator, atoms)
    _check_results(calculator, atoms)
    _check_unchanged(atoms, before)
    scale = max(1.0, float(np.abs(forces).max()))
    tolerance = 1e-4 * scale  # float32 forces with cancellation
    energy_tolerance = tolerance + 2e-7 * abs(energy)  # of a total energy in float32
    again = atoms.copy()
    again.positions[0] += [0.05, -0.03, 0.02]
    _, moved = _energy_and_forces(calculator, again)
    assert not np.array_equal(moved, forces), "an atom moved and the forces stayed: results do not follow positions"
    e, f = _energy_and_forces(calculator, atoms)
    _assert_close("forces of the same structure, evaluated again", f, forces, tolerance)
    _assert_close("energy of the same structure, evaluated again", e, energy, energy_tolerance)
    for name, changed, order in _same_structures(atoms):
        e, f = _energy_and_forces(calculator, changed)
        _assert_close(f"forces after {name}", f, forces[order], tolerance)
        _assert_close(f"energy after {name}", e, energy, energy_tolerance)
    _, alone = _energy_and_forces(calculator, Atoms(atoms.symbols[:1], positions=[[0.3, -0.2, 0.1]]))
    _assert_close("forces on one atom alone", alone, np.zeros((1, 3)), max(tolerance, force_tolerance))
    _check_gradient(calculator, atoms, forces, force_tolerance)


def _energy_and_forces(calculator: Any, atoms: Atoms) -> tuple[float, np.ndarray]:
    structure = atoms.copy()
    structure.calc = calculator
    forces = np.array(structure.get_forces(apply_constraint=False))
    assert np.isfinite(forces).all(), f"forces hold values that are not finite for {atoms.symbols}"
    return structure.get_potential_energy(), forces


def _check_results(calculator: Any, atoms: Atoms) -> None:
    structure = atoms.copy()
    structure.calc = calculator
    energy, forces = structure.get_potential_energy(), structure.get_forces(apply_constraint=False)
    assert isinstance(energy, float), f"energy is a {type(energy).__name__}, expected a float"
    assert isinstance(forces, np.ndarray), f"forces are a {type(forces).__name__}, expected a numpy array"
    assert forces.shape == (len(atoms), 3), f"forces have shape {forces.shape}, expected ({len(atoms)}, 3)"
    unknown = set(calculator.results) - set(all_properties)
    assert not unknown, f"results hold keys that ASE does not know: {sorted(unknown)}"
    if "stress" in calculator.implemented_properties and atoms.pbc.all():
        stress = structure.get_stress()
        assert stress.shape == (6,), f"stress has shape {stress.shape}, expected (6,) in Voigt order"
    kept = forces.copy()
    forces += 1.0
    repeated = structure.get_forces(apply_constraint=False)
    assert np.array_equal(repeated, kept), "writing into returned forces changed the cached ones"


def _check_unchanged(atoms: Atoms, before: Atoms) -> None:
    assert set(atoms.arrays) == set(before.arrays), "the calculator added or removed arrays of the structure"
    for key, value in before.arrays.items():
        assert np.array_equal(atoms.arrays[key], value), f"the calculator changed the structure's {key}"
    assert np.array_equal(atoms.cell.array, before.cell.array), "the calculator changed the structure's cell"
    assert np.array_equal(atoms.pbc, before.pbc), "the calculator changed the structure's pbc"
    assert atoms.info == before.info, "the calculator changed the structure's info"


def _same_structures(atoms: Atoms) -> list[tuple[str, Atoms, np.ndarray]]:
    """Descriptions of the same physics: name, structure, and the index of each of its atoms in the original."""
    identity = np.arange(len(atoms))
    translated = atoms.copy()
    translated.positions += [1.7, -0.9, 2.3]
    order = identity[::-1]
    out = [("a translation", translated, identity), ("a permutation", atoms[order], order)]
    for axis in np.flatnonzero(atoms.pbc):
        wrapped = atoms.copy()
        wrapped.positions[-1] += wrapped.cell.array[axis]
        out.append((f"moving one atom by lattice vector {axis}", wrapped, identity))
    return out


def _check_gradient(calculator: Any, atoms: Atoms, forces: np.ndarray, tolerance: float, step: float = 5e-3) -> None:
    """Central differences of fourth order on the three atoms with the largest forces."""
    for atom in np.argsort(-np.linalg.norm(forces, axis=1))[:3]:
        for axis in range(3):
            energies = []
            for k in (-2, -1, 1, 2):
                displaced = atoms.copy()
                displaced.positions[atom, axis] += k * step
                energies.append(_energy_and_forces(calculator, displaced)[0])
            numerical = -(energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
            difference = abs(numerical - forces[atom, axis])
            assert difference <= tolerance, (
                f"force on atom {atom}, axis {axis} is {forces[atom, axis]:.6g} eV/Å, minus the gradient of the energy "
                f"{numerical:.6g}: they differ by {difference:.2g}, more than {tolerance:.2g}"
            )


def _assert_close(what: str, got: Any, expected: Any, tolerance: float) -> None:
    difference = float(np.abs(np.asarray(got) - np.asarray(expected)).max(initial=0.0))
    assert difference <= tolerance, f"{what}: differ by {difference:.3g}, more than {tolerance:.3g}"


def check_potential(potential: "Potential", seed: int = 0) -> None:
    """Assert what every room relies on of a Potential; run on a float64 copy, the potential is not touched.

    Shapes and types; the graph is not changed; a batch gives what single structures give; one atom, and atoms without
    neighbours, are handled; a lattice translation, a permutation and an inverted order of edges change nothing; forces
    are minus the gradient of the energy and stress is its derivative by strain, unless forces are direct. Rotations are
    not checked: measure them with ``equivariance_error``.
    """
    import copy

    import torch

    from equimd.graph import batch_graphs

    double = copy.deepcopy(potential).to(torch.float64).to("cpu").eval()
    rng = np.random.default_rng(seed)
    cluster, crystal = _random_structure(double, rng, periodic=False), _random_structure(double, rng, periodic=True)
    single = Atoms(numbers=[double.species[0]], positions=[[0.1, 0.2, 0.3]])
    apart = Atoms(numbers=[double.species[-1]] * 2, positions=[[0.0, 0.0, 0.0], [0.0, 0.0, 3 * double.cutoff]])
    structures = [cluster, single, crystal, apart]
    graphs = [_graph(atoms, double) for atoms in structures]
    before = [graph.clone() for graph in graphs]
    alone = [double(graph, stress=True) for graph in graphs]
    for atoms, got in zip(structures, alone, strict=True):
        n = len(atoms)
        shapes = tuple(tuple(x.shape) for x in (got.energy, got.energies, got.forces, got.stress))
        expected = ((1,), (n,), (n, 3), (1, 3, 3))
        assert shapes == expected, f"energy, energies, forces, stress have shapes {shapes}, expected {expected}"
        assert got.energy.dtype == torch.float64, f"energy is {got.energy.dtype}, expected float64"
        assert torch.isfinite(got.forces).all(), f"forces of {atoms.symbols} are not finite"
        assert torch.isfinite(got.energy).all(), f"the energy of {atoms.symbols} is not finite"
    for graph, kept in zip(graphs, before, strict=True):
        for key, value in kept.to_dict().items():
            same = (
                torch.equal(torch.nan_to_num(graph[key]), torch.nan_to_num(value)) if torch.is_tensor(value) else True
            )
            assert same, f"the potential changed {key} of its graph"
    batch = double(batch_graphs(graphs), stress=True)
    scale = max(1.0, float(batch.forces.abs().max()))
    tolerance = 1e-9 * scale  # order of summation in float64
    _assert_close("energies in a batch and alone", batch.energy, torch.cat([a.energy for a in alone]), 10 * tolerance)
    _assert_close("forces in a batch and alone", batch.forces, torch.cat([a.forces for a in alone]), tolerance)
    if not double.direct_forces:
        _assert_close("forces on one atom alone", alone[1].forces, np.zeros((1, 3)), tolerance)
    _check_invariances(double, cluster, tolerance)
    _check_invariances(double, crystal, tolerance)
    if not double.direct_forces:
        _check_potential_gradient(double, crystal, 1e-6 * scale)


def _random_structure(potential: "Potential", rng: np.random.Generator, periodic: bool) -> Atoms:
    """Six atoms of the potential's species on a rattled grid of 1.6 Å; the cell is triclinic and below the cutoff."""
    grid = np.array([[x, y, z] for x in range(2) for y in range(2) for z in range(2)], dtype=float)[:6] * 1.6
    numbers = rng.permutation(np.resize(potential.species, 6))
    cell = np.array([[3.6, 0.0, 0.0], [0.5, 3.8, 0.0], [-0.3, 0.4, 4.0]]) if periodic else None
    return Atoms(numbers=numbers, positions=grid + rng.uniform(-0.15, 0.15, (6, 3)), cell=cell, pbc=periodic)


def _graph(atoms: Atoms, potential: "Potential") -> "AtomGraph":
    from equimd.graph import graph_from_arrays

    return graph_from_arrays(atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc, potential.cutoff)


def _check_invariances(potential: "Potential", atoms: Atoms, tolerance: float) -> None:
    base = potential(_graph(atoms, potential))
    for name, changed, order in _same_structures(atoms):
        got = potential(_graph(changed, potential))
        _assert_close(f"forces after {name}", got.forces, base.forces[order.copy()], tolerance)
        _assert_close(f"energy after {name}", got.energy, base.energy, 10 * tolerance)


def _check_potential_gradient(potential: "Potential", atoms: Atoms, tolerance: float, step: float = 1e-3) -> None:
    """Central differences of fourth order along one random displacement and one random strain."""
    rng = np.random.default_rng(1)
    direction, strain = rng.normal(size=(len(atoms), 3)), rng.normal(size=(3, 3)) * 0.1

    def energy(k: float, displace: bool) -> float:
        changed = atoms.copy()
        if displace:
            changed.positions += k * step * direction
        else:
            deformation = np.eye(3) + k * step * strain
            changed.set_cell(atoms.cell.array @ deformation)
            changed.positions = atoms.positions @ deformation
        return float(potential(_graph(changed, potential)).energy[0])

    base = potential(_graph(atoms, potential), stress=True)
    for what, displace, analytic in (
        ("forces", True, -float((base.forces.numpy() * direction).sum())),
        ("stress", False, float((base.stress[0].numpy() * strain).sum()) * atoms.get_volume()),
    ):
        e = [energy(k, displace) for k in (-2, -1, 1, 2)]
        numerical = (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * step)
        _assert_close(f"{what} and the numerical derivative of the energy", analytic, numerical, tolerance)
