"""vesin behind our function against ASE's list and brute force; the Verlet list against fresh ones."""

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list as ase_neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from equimd.errors import InputError
from equimd.models.selfcheck import brute_force_neighbors
from equimd.neighbors import VerletList, neighbor_list

TRICLINIC = np.array([[6.0, 0.4, -0.3], [2.1, 5.5, 0.2], [-1.3, 0.8, 7.0]])
EVERY_PBC = [tuple(bool(k & bit) for bit in (1, 2, 4)) for k in range(8)]


def as_set(edges, shifts):
    out = {(int(i), int(j), *map(int, s)) for i, j, s in zip(*edges, shifts, strict=True)}
    assert len(out) == edges.shape[1], "an edge stands twice"
    return out


def check(positions, cell, pbc, cutoff):
    """Our list is ASE's, has every reverse edge, is sorted, and its shifts give distances within the cutoff."""
    positions, cell, pbc = np.asarray(positions), np.asarray(cell, dtype=float), np.asarray(pbc)
    edges, shifts = neighbor_list(positions, cell, pbc, cutoff)
    assert edges.dtype == np.int64
    assert edges.shape == (2, len(shifts))
    ours = as_set(edges, shifts)
    atoms = Atoms(numbers=np.ones(len(positions)), positions=positions, cell=cell, pbc=pbc)
    i, j, s = ase_neighbor_list("ijS", atoms, cutoff)
    assert ours == as_set(np.stack([i, j]), s)
    assert ours == {(j, i, -a, -b, -c) for i, j, a, b, c in ours}
    rows = np.column_stack([edges.T, shifts]).tolist()
    assert rows == sorted(rows)
    vectors = positions[edges[1]] - positions[edges[0]] + shifts @ cell
    assert (np.linalg.norm(vectors, axis=1) <= cutoff).all()
    assert (shifts[:, ~pbc] == 0).all()
    return edges, shifts


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("pbc", EVERY_PBC)
@pytest.mark.parametrize("outside", [False, True])
def test_triclinic_cell_with_any_periodicity(rng, pbc, outside):
    positions = rng.random((15, 3)) @ TRICLINIC
    if outside:
        positions += rng.integers(-3, 4, size=(15, 3)) @ TRICLINIC
    check(positions, TRICLINIC, pbc, 4.0)


@pytest.mark.parametrize("pbc", EVERY_PBC)
def test_left_handed_cell(rng, pbc):
    for cell in (TRICLINIC[[1, 0, 2]], -TRICLINIC, TRICLINIC * [[1], [1], [-1]]):
        assert np.linalg.det(cell) < 0
        check(rng.random((12, 3)) @ cell, cell, pbc, 4.0)


@pytest.mark.parametrize("cutoff", [3.0, 5.0, 9.0])
def test_cell_smaller_than_the_cutoff(rng, cutoff):
    cell = np.array([[2.1, 0.0, 0.3], [0.7, 1.9, 0.0], [0.2, -0.4, 2.5]])
    for n in (1, 2, 3):
        edges, _ = check(rng.random((n, 3)) @ cell, cell, (True, True, True), cutoff)
        assert edges.shape[1] >= 12 * n
        check(rng.random((n, 3)) @ cell, cell, (True, False, True), cutoff)


def test_atom_is_its_own_neighbour_through_the_boundary():
    edges, shifts = check(np.zeros((1, 3)), 3.0 * np.eye(3), (True, True, True), 3.1)
    assert edges.shape[1] == 6
    assert (edges == 0).all()
    assert (np.abs(shifts).sum(axis=1) == 1).all()


def test_huge_cell(rng):
    check(rng.random((150, 3)) * 40.0, 40.0 * np.eye(3), (True, True, True), 5.0)
    positions = rng.random((30, 3)) * 12.0 + 890.0  # across the corner; ASE's list takes minutes here
    found = as_set(*neighbor_list(positions, 900.0 * np.eye(3), np.ones(3, dtype=bool), 5.0))
    assert found == brute_force_neighbors(positions, 900.0 * np.eye(3), np.ones(3, dtype=bool), 5.0)


def test_very_flat_and_very_sheared_cells(rng):
    flat = np.diag([20.0, 20.0, 1.5])
    check(rng.random((10, 3)) @ flat, flat, (True, True, True), 4.0)
    sheared = np.array([[5.0, 0.0, 0.0], [24.0, 5.0, 0.0], [-17.0, 33.0, 5.0]])
    check(rng.random((10, 3)) @ sheared, sheared, (True, True, True), 4.0)


def test_non_periodic_structure_ignores_its_cell(rng):
    positions = rng.random((20, 3)) * 8.0
    free, shifts = neighbor_list(positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), 4.0)
    assert not shifts.any()
    for cell in (2.0 * np.eye(3), TRICLINIC, -TRICLINIC, np.ones((3, 3))):
        edges, _ = neighbor_list(positions, cell, np.zeros(3, dtype=bool), 4.0)
        assert np.array_equal(edges, free)


def test_slab_ignores_the_vector_that_is_not_periodic(rng):
    positions = rng.random((20, 3)) * [6.0, 6.0, 30.0]
    pbc = np.array([True, True, False])
    wanted = neighbor_list(positions, np.diag([6.0, 6.0, 100.0]), pbc, 4.0)
    for third in ([0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [6.0, 0.0, 0.0], [3.0, 2.0, -4.0]):
        got = neighbor_list(positions, np.array([[6.0, 0, 0], [0, 6.0, 0], third]), pbc, 4.0)
        assert np.array_equal(got[0], wanted[0])
        assert np.array_equal(got[1], wanted[1])


def test_wire_far_from_the_axis(rng):
    """Atoms spread widely in the directions that are not periodic, far from the origin and outside any cell."""
    positions = rng.random((30, 3)) * [50.0, 5.0, 50.0] + [1000.0, 0.0, -700.0]
    check(positions, np.diag([1.0, 5.0, 1.0]), (False, True, False), 6.0)


@pytest.mark.parametrize("pbc", [(False, False, False), (True, True, False), (False, True, False)])
@pytest.mark.parametrize("far", [1e3, 1e6, 1e12, 1e100])
def test_an_atom_lost_to_the_vacuum_is_one_without_neighbours(pbc, far):
    """The search counts cells up to the farthest atom in 32 bits, and would end the process."""
    pbc, cell = np.array(pbc), 4.0 * np.eye(3)
    positions = np.array([[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 2.0], [0.5, 2.5, 1.0]])
    near = positions.copy()
    positions[3, 0 if not pbc[0] else 2] = far
    near[3, 0 if not pbc[0] else 2] = 50.0
    edges, shifts = neighbor_list(positions, cell, pbc, 3.5)
    wanted = neighbor_list(near, cell, pbc, 3.5)
    assert np.array_equal(edges, wanted[0])
    assert np.array_equal(shifts, wanted[1])
    assert positions[3].max() == far


def test_atoms_too_many_cells_away_to_be_counted_are_refused():
    positions = np.array([[0.0, 0, 0], [1.0, 0, 0]])
    moved = positions + [[0, 0, 0], [4e8, 0, 0]]
    cell, pbc = 4.0 * np.eye(3), np.ones(3, dtype=bool)
    assert neighbor_list(moved, cell, pbc, 3.5)[0].shape == neighbor_list(positions, cell, pbc, 3.5)[0].shape
    with pytest.raises(InputError, match="positions of atom 1 are .*at most 1e"):
        neighbor_list(positions + [[0, 0, 0], [2e10, 0, 0]], cell, pbc, 3.5)


@pytest.mark.parametrize("n", [0, 1])
def test_none_and_one(n):
    edges, shifts = neighbor_list(np.zeros((n, 3)), np.zeros((3, 3)), np.zeros(3, dtype=bool), 5.0)
    assert edges.shape == (2, 0)
    assert shifts.shape == (0, 3)


def test_inputs_of_other_layout_are_understood_and_not_changed(rng):
    positions = rng.random((10, 3)) @ TRICLINIC
    wanted = neighbor_list(positions, TRICLINIC, np.ones(3, dtype=bool), 4.0)
    fortran = np.asfortranarray(positions)
    strided = np.repeat(positions, 2, axis=0)[::2]
    for other in (fortran, strided, positions.tolist()):
        got = neighbor_list(other, np.asfortranarray(TRICLINIC), [True, True, True], 4.0)
        assert np.array_equal(got[0], wanted[0])
        assert np.array_equal(got[1], wanted[1])
    assert np.array_equal(fortran, positions)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.sampled_from(EVERY_PBC),
    st.integers(1, 8),
    st.floats(1.0, 6.0),
    st.floats(2.0, 9.0),
)
def test_random_cells_against_brute_force(seed, pbc, n, cutoff, size):
    rng = np.random.default_rng(seed)
    cell = size * rng.normal(size=(3, 3))
    while abs(np.linalg.det(cell)) < 0.2 * np.prod(np.linalg.norm(cell, axis=1)):
        cell = size * rng.normal(size=(3, 3))
    positions = rng.normal(size=(n, 3)) @ cell
    found = as_set(*neighbor_list(positions, cell, np.array(pbc), cutoff))
    assert found == brute_force_neighbors(positions, cell, np.array(pbc), cutoff)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_positions_that_are_not_finite_are_refused(value):
    positions = np.zeros((3, 3))
    positions[1, 2] = value
    with pytest.raises(InputError, match="positions of atom 1"):
        neighbor_list(positions, np.eye(3), np.zeros(3, dtype=bool), 5.0)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (np.zeros((3, 3)), "cell vector 0 is zero"),
        (np.diag([1.0, 0.0, 1.0]), "cell vector 1 is zero"),
        (np.array([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0]]), "no volume"),
        (np.diag([1.0, np.nan, 1.0]), "cell"),
        (np.diag([1.0, np.inf, 1.0]), "cell"),
    ],
)
def test_impossible_cells_are_refused(cell, says):
    with pytest.raises(InputError, match=says) as caught:
        neighbor_list(np.zeros((2, 3)), cell, np.ones(3, dtype=bool), 5.0)
    assert "\n" not in str(caught.value)


# --- Verlet list -----------------------------------------------------------------------------------------------------


def within(positions, cell, cutoff, edges, shifts):
    """The edges within the cutoff as vectors between atoms, which wrapping does not change."""
    vectors = positions[edges[1]] - positions[edges[0]] + shifts @ cell
    near = np.linalg.norm(vectors, axis=1) <= cutoff
    rows = np.column_stack([edges.T, np.round(vectors, 6)])[near]
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("skin", [0.0, 0.5, 2.0])
def test_walk_gives_what_fresh_lists_give(rng, skin, pbc, wrap):
    cutoff, pbc = 3.5, np.array(pbc)
    positions = rng.random((14, 3)) @ TRICLINIC
    verlet = VerletList(cutoff, skin)
    steps = 60
    for _ in range(steps):
        positions = positions + 0.05 * rng.normal(size=positions.shape)
        if wrap:
            fractional = positions @ np.linalg.inv(TRICLINIC)
            positions = (fractional - np.floor(fractional) * pbc) @ TRICLINIC
        edges, shifts, _ = verlet.update(positions, TRICLINIC, pbc)
        fresh = neighbor_list(positions, TRICLINIC, pbc, cutoff)
        got = within(positions, TRICLINIC, cutoff, edges, shifts)
        np.testing.assert_allclose(got, within(positions, TRICLINIC, cutoff, *fresh), atol=1e-5)
    assert verlet.n_builds == steps if skin == 0 else verlet.n_builds < steps


def test_verlet_list_is_kept_to_half_the_skin_and_no_further():
    verlet = VerletList(3.0, 0.5)
    cell, pbc = 20.0 * np.eye(3), np.ones(3, dtype=bool)
    positions = np.array([[0.0, 0, 0], [3.4, 0, 0], [3.6, 3.6, 0]])
    assert verlet.update(positions, cell, pbc)[2]
    assert not verlet.update(positions + [0.2499, 0, 0], cell, pbc)[2]
    assert verlet.update(positions + [0.2501, 0, 0], cell, pbc)[2]
    # Displacement counts from the last build, not from the last step.
    for _ in range(3):
        positions = positions + [0, 0.1, 0]
        rebuilt = verlet.update(positions + [0.2501, 0, 0], cell, pbc)[2]
    assert rebuilt
    assert verlet.n_builds == 3


def test_anything_else_that_changes_rebuilds():
    verlet = VerletList(3.0, 0.5)
    positions, cell, pbc = np.zeros((2, 3)) + [[0.0], [2.0]], 8.0 * np.eye(3), np.ones(3, dtype=bool)
    verlet.update(positions, cell, pbc)
    assert not verlet.update(positions, cell, pbc)[2]
    assert verlet.update(positions, cell * 1.0001, pbc)[2]
    assert verlet.update(positions, cell * 1.0001, np.array([True, True, False]))[2]
    assert verlet.update(np.zeros((3, 3)) + [[0.0], [2.0], [4.0]], cell, pbc)[2]
    verlet.reset()
    assert verlet.update(np.zeros((3, 3)) + [[0.0], [2.0], [4.0]], cell, pbc)[2]


def test_verlet_list_keeps_no_reference_to_what_it_was_given():
    verlet = VerletList(3.0, 0.5)
    positions, cell, pbc = np.array([[0.0, 0, 0], [2.0, 0, 0]]), 8.0 * np.eye(3), np.ones(3, dtype=bool)
    verlet.update(positions, cell, pbc)
    positions += 3.0
    assert verlet.update(positions, cell, pbc)[2]
    cell *= 2
    assert verlet.update(positions, cell, pbc)[2]
    pbc[:] = False
    assert verlet.update(positions, cell, pbc)[2]


def test_bad_input_does_not_spoil_the_verlet_list():
    verlet = VerletList(3.0, 0.5)
    positions, cell, pbc = np.array([[0.0, 0, 0], [2.0, 0, 0]]), 8.0 * np.eye(3), np.ones(3, dtype=bool)
    wanted = verlet.update(positions, cell, pbc)[:2]
    with pytest.raises(InputError):
        verlet.update(positions * np.nan, cell, pbc)
    edges, shifts, _ = verlet.update(positions, cell, pbc)
    assert np.array_equal(edges, wanted[0])
    assert np.array_equal(shifts, wanted[1])


def test_skipping_the_rebuild_would_be_wrong(rng, monkeypatch):
    """Negative twin: a list that is never rebuilt loses pairs on the same walk."""
    monkeypatch.setattr(VerletList, "_is_valid", lambda *_: True)
    verlet = VerletList(3.5, 0.5)
    pbc, positions = np.ones(3, dtype=bool), rng.random((14, 3)) @ TRICLINIC
    verlet.update(positions, TRICLINIC, pbc)
    positions = positions + rng.normal(size=positions.shape)
    edges, shifts, _ = verlet.update(positions, TRICLINIC, pbc)
    fresh = within(positions, TRICLINIC, 3.5, *neighbor_list(positions, TRICLINIC, pbc, 3.5))
    assert len(within(positions, TRICLINIC, 3.5, edges, shifts)) != len(fresh)


def test_negative_skin_is_refused():
    with pytest.raises(InputError, match="skin is -1"):
        VerletList(5.0, -1)
