import numpy as np
import pytest
import torch
from scipy.integrate import lebedev_rule
from scipy.spatial.transform import Rotation

from equimd import rotations as module
from equimd.errors import InputError
from equimd.rotations import (
    MAX_DEGREE,
    quadrature,
    random_rotations,
    rotate_back_tensor,
    rotate_back_vectors,
    rotate_tensor,
    rotate_vectors,
)

RNG = np.random.default_rng(0)


def mean_wigner_norms(rotations, weights, l_max):
    """‖Σ_k w_k D^l(R_k)‖² for l = 0 … l_max, by characters: Σ_kq w_k w_q χ_l(R_k R_qᵀ). Zero if l is integrated."""
    traces = rotations.reshape(len(rotations), 9) @ rotations.reshape(len(rotations), 9).T
    angles = np.arccos(np.clip((traces - 1) / 2, -1, 1))
    norms, character = [], np.ones_like(angles)
    for degree in range(l_max + 1):
        if degree:
            character = character + 2 * np.cos(degree * angles)
        norms.append(weights @ character @ weights)
    return np.array(norms)


def proper_part(sample):
    keep = np.linalg.det(sample.rotations) > 0
    weights = sample.weights[keep]
    return sample.rotations[keep], weights / weights.sum()


# --- the convention --------------------------------------------------------------------------------------------------


def test_vectors_and_tensors_rotate_as_column_vectors_would():
    rotations = random_rotations(5, 1).rotations
    x, sigma = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 3))
    np.testing.assert_allclose(rotate_vectors(x, rotations), np.einsum("kab,nb->kna", rotations, x), atol=1e-14)
    expected = np.einsum("kab,bc,kdc->kad", rotations, sigma, rotations)
    np.testing.assert_allclose(rotate_tensor(sigma, rotations), expected, atol=1e-14)
    np.testing.assert_allclose(rotate_vectors(x, rotations[0]), (rotations[0] @ x.T).T, atol=1e-14)


def test_quarter_turn_by_hand():
    about_z = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(rotate_vectors(np.array([[1.0, 0.0, 0.0]]), about_z), [[0.0, 1.0, 0.0]])
    tensile_along_x = np.diag([1.0, 0.0, 0.0])
    np.testing.assert_allclose(rotate_tensor(tensile_along_x, about_z), np.diag([0.0, 1.0, 0.0]))


def test_back_rotation_undoes_the_rotation():
    rotations = random_rotations(6, 2).rotations
    x, sigma = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 3))
    back = rotate_back_vectors(rotate_vectors(x, rotations), rotations)
    np.testing.assert_allclose(back, np.broadcast_to(x, back.shape), atol=1e-14)
    back = rotate_back_tensor(rotate_tensor(sigma, rotations), rotations)
    np.testing.assert_allclose(back, np.broadcast_to(sigma, back.shape), atol=1e-14)


def test_the_wrong_transpose_does_not():
    """Negative twin: rotating forth once more is not rotating back."""
    rotations = random_rotations(6, 2).rotations
    x, sigma = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 3))
    assert np.abs(rotate_vectors(rotate_vectors(x, rotations), rotations) - x).max() > 0.5
    assert np.abs(rotate_tensor(rotate_tensor(sigma, rotations), rotations) - sigma).max() > 0.5


def test_torch_equals_numpy():
    rotations, x, sigma = random_rotations(3, 3).rotations, RNG.normal(size=(4, 3)), RNG.normal(size=(3, 3))
    for function, value in ((rotate_vectors, x), (rotate_tensor, sigma)):
        got = function(torch.tensor(value), torch.tensor(rotations))
        np.testing.assert_allclose(got.numpy(), function(value, rotations), atol=1e-15)
    stack = rotate_vectors(x, rotations)
    np.testing.assert_allclose(
        rotate_back_vectors(torch.tensor(stack), torch.tensor(rotations)).numpy(), rotate_back_vectors(stack, rotations)
    )


def test_distances_and_cell_coordinates_survive():
    rotation = random_rotations(2, 4).rotations[0]
    cell, fractional = RNG.normal(size=(3, 3)), RNG.uniform(size=(5, 3))
    rotated = rotate_vectors(fractional @ cell, rotation)
    np.testing.assert_allclose(rotated, fractional @ rotate_vectors(cell, rotation), atol=1e-14)


# --- random elements -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inversion", [False, True])
def test_random_rotations_are_uniform_and_repeatable(inversion):
    sample = random_rotations(20_000, 5, inversion)
    r = sample.rotations
    np.testing.assert_allclose(r @ r.swapaxes(1, 2), np.broadcast_to(np.eye(3), r.shape), atol=1e-13)
    # Of 20,000 elements the mean of a function of unit size scatters by 0.007.
    assert np.linalg.det(r).mean() == pytest.approx(0.0 if inversion else 1.0, abs=0.03)
    np.testing.assert_allclose(r.mean(0), 0.0, atol=0.03)
    second = np.einsum("kab,kcd->abcd", r, r) / len(r)
    np.testing.assert_allclose(second, np.einsum("ac,bd->abcd", np.eye(3), np.eye(3)) / 3, atol=0.03)
    again = random_rotations(20_000, 5, inversion)
    np.testing.assert_array_equal(again.rotations, r)
    assert np.abs(random_rotations(20_000, 6, inversion).rotations - r).max() > 0.5
    assert sample.kind == "random"
    assert sample.degree is None


def test_one_random_rotation_is_refused():
    with pytest.raises(InputError, match="n_rotations is 1; a spread needs at least 2"):
        random_rotations(1, 0)


# --- quadratures -----------------------------------------------------------------------------------------------------

# Where each rule must fail, by its symmetry: the octahedral group has an invariant at l = 4, the icosahedral one at
# l = 6, and degree + 1 in-plane angles alias m = degree + 1 with m = 0.
RULES = {0: 4, 1: 4, 2: 4, 3: 4, 4: 6, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10, 10: 11, 11: 12, 12: 13, 15: 16}


@pytest.mark.parametrize(("degree", "inversion"), [(d, False) for d in RULES] + [(d, True) for d in (3, 5, 6)])
def test_each_rule_is_exact_to_its_degree_and_fails_beyond(degree, inversion):
    sample = quadrature(degree, inversion)
    assert sample.kind == "quadrature"
    assert sample.degree == degree
    assert (sample.weights > 0).all()
    assert sample.weights.sum() == pytest.approx(1.0, abs=1e-13)
    first_failure = RULES[degree]
    norms = mean_wigner_norms(*proper_part(sample), first_failure)
    assert norms[0] == pytest.approx(1.0, abs=1e-12)
    assert np.abs(norms[1:first_failure]).max(initial=0.0) < 1e-9  # arccos near 0 costs half of the digits
    assert norms[first_failure] > 1e-3


def test_as_many_angles_as_the_order_is_one_too_few():
    """Negative twin of degree + 1 angles: n × n fails at l = n."""
    order = 7
    points, weights = lebedev_rule(order)
    alpha, beta = np.arctan2(points[1], points[0]), np.arccos(np.clip(points[2], -1, 1))
    gamma = 2 * np.pi * np.arange(order) / order
    eulers = [(a, b, c) for a, b in zip(alpha, beta, strict=True) for c in gamma]
    rotations = Rotation.from_euler("ZYZ", eulers).as_matrix()
    w = np.repeat(weights / weights.sum(), order) / order
    norms = mean_wigner_norms(rotations, w, order)
    assert np.abs(norms[1:order]).max() < 1e-9
    assert norms[order] > 1e-3


def test_inversion_sees_parity():
    """The determinant is an odd function: O(3) averages it to 0, SO(3) cannot."""
    for degree in (3, 5, 8):
        with_inversion, without = quadrature(degree, True), quadrature(degree, False)
        assert with_inversion.weights @ np.linalg.det(with_inversion.rotations) == pytest.approx(0.0, abs=1e-14)
        assert without.weights @ np.linalg.det(without.rotations) == pytest.approx(1.0)
        assert len(with_inversion) == 2 * len(without)


def test_weights_of_all_used_lebedev_orders_are_positive_and_skipped_ones_are_not():
    for order in module._LEBEDEV_ORDERS:
        assert (lebedev_rule(order)[1] > 0).all()
    for order in (13, 25, 27):
        assert (lebedev_rule(order)[1] < 0).any()


def test_degrees_out_of_range_are_refused():
    for degree in (-1, MAX_DEGREE + 1):
        with pytest.raises(InputError, match=f"quadrature degree is {degree}; accepted are 0 to {MAX_DEGREE}"):
            quadrature(degree)
