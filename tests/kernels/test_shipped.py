"""The shipped potentials give the same energies and forces by every backend."""

from pathlib import Path

import pytest
from ase.io import read

from equimd import kernels
from equimd.graph import graph_from_arrays
from equimd.models.checkpoint import load_potential

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in ROOT.glob("potentials/*/model.safetensors"))
# Rounding of float32 is 6e-8; float64 is limited by the slopes of the radial tables.
EQUAL = {"float32": 1e-6, "float64": 1e-8}


def load(name, dtype):
    """The potential, and the graph of a frame at 500 K that it was not trained on."""
    potential = load_potential(ROOT / "potentials" / name, dtype=dtype).requires_grad_(False)
    atoms = read(ROOT / "data" / name.rpartition("-")[0] / "test.xyz.gz", index=3)
    arrays = (atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc)
    return potential, graph_from_arrays(*arrays, potential.cutoff)


def relative_difference(a, b):
    """The larger of those of atomic energies and of forces, root mean square."""
    return max(float((x - y).norm() / y.norm()) for x, y in ((a.energies, b.energies), (a.forces, b.forces)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_gives_the_same(name, dtype):
    (potential, graph), (double, _) = load(name, dtype), load(name, "float64")
    with kernels.using("reference"):
        reference = double(graph)
    assert potential.has_frozen_network
    assert relative_difference(potential(graph), reference) < EQUAL[dtype]
    with kernels.using("llvm"):
        assert not potential.has_frozen_network
        assert relative_difference(potential(graph), reference) < EQUAL[dtype]


def test_another_potential_does_not_give_the_same():
    (one, graph), (other, _) = load("ethanol-equivariant", "float32"), load("ethanol-transformer", "float32")
    assert relative_difference(one(graph), other(graph)) > 1e-3
