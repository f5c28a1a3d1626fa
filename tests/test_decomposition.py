import numpy as np
import pytest
import torch

from equimd.decomposition import decompose, percent_of_loss, split_by_parity, split_convex_loss, variance
from equimd.errors import InputError


def sample(seed=0, n_rotations=7, n_atoms=5, uniform=False):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n_rotations, n_atoms, 3))
    w = np.full(n_rotations, 1.0) if uniform else rng.uniform(0.1, 1.0, n_rotations)
    return a, w / w.sum(), rng.normal(size=(n_atoms, 3))


@pytest.mark.parametrize("corrected", [False, True])
def test_identity_holds_exactly_at_finite_k(corrected):
    a, w, y = sample(uniform=corrected)
    d = decompose(a, w, y, corrected)
    assert abs(d.l_total - (d.l_mean + d.l_equiv)) < 1e-12
    assert abs(d.l_equiv - d.spread.mean() / 3) < 1e-12
    np.testing.assert_allclose(d.l_total, sum(wk * ((ak - y) ** 2).mean() for wk, ak in zip(w, a, strict=True)))


def test_identity_fails_for_another_centre_than_the_mean():
    """Negative twin: the split is exact only around the twirled prediction."""
    a, w, y = sample()
    centre = a[0]
    wrong = ((centre - y) ** 2).mean() + np.einsum("k,kna->", w, (a - centre) ** 2) / y.size
    assert abs(wrong - decompose(a, w, y, corrected=False).l_total) > 1e-2


def test_correction_is_unbiased_and_its_absence_is_not():
    """a_k = m + noise of variance 1: l_equiv is 1 and l_mean |m − y|², at K = 3, over many draws."""
    rng = np.random.default_rng(1)
    n_atoms, y = 20_000, 0.0
    a = 0.5 + rng.normal(size=(3, n_atoms, 3))
    w = np.full(3, 1 / 3)
    good, bad = decompose(a, w, np.full((n_atoms, 3), y), True), decompose(a, w, np.full((n_atoms, 3), y), False)
    # 120,000 degrees of freedom: relative standard error sqrt(2/120000) = 0.4 %.
    assert good.l_equiv == pytest.approx(1.0, abs=0.02)
    assert good.l_mean == pytest.approx(0.25, abs=0.02)
    assert bad.l_equiv == pytest.approx(2 / 3, abs=0.02)
    assert bad.l_mean == pytest.approx(0.25 + 1 / 3, abs=0.02)


@pytest.mark.parametrize("corrected", [False, True])
def test_torch_equals_numpy_and_is_differentiable(corrected):
    a, w, y = sample(uniform=True)
    expected = decompose(a, w, y, corrected)
    tensor = torch.tensor(a, requires_grad=True)
    got = decompose(tensor, torch.tensor(w), torch.tensor(y), corrected)
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(left.detach().numpy(), right, rtol=1e-13, atol=1e-14)
    got.l_equiv.backward()
    assert torch.isfinite(tensor.grad).all()
    for loss in ("mse", "mae", "huber", "l2"):
        left = split_convex_loss(torch.tensor(a), torch.tensor(w), torch.tensor(y), loss)
        np.testing.assert_allclose(left, split_convex_loss(a, w, y, loss), rtol=1e-12)


def test_without_reference():
    a, w, _ = sample()
    d = decompose(a, w, None, corrected=False)
    assert d.l_total is None
    assert d.l_mean is None
    np.testing.assert_allclose(d.mean, np.einsum("k,kna->na", w, a))


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "l2"])
def test_jensen_gap_is_never_negative(loss):
    for seed in range(20):
        a, w, y = sample(seed)
        split = split_convex_loss(a, w, y, loss, huber_delta=0.7)
        assert split.l_equiv > 0
        assert split.l_total == pytest.approx(split.l_mean + split.l_equiv, abs=1e-14)


def test_convex_losses_against_their_definitions():
    a, w, y = sample()
    e, delta = a - y, 0.7
    huber = np.where(abs(e) < delta, 0.5 * e**2, delta * (abs(e) - 0.5 * delta))
    expected = {"mse": e**2, "mae": abs(e), "huber": huber, "l2": np.linalg.norm(e, axis=-1)}
    for loss, values in expected.items():
        total = sum(wk * vk.mean() for wk, vk in zip(w, values, strict=True))
        assert split_convex_loss(a, w, y, loss, delta).l_total == pytest.approx(total, abs=1e-14)
    mse = decompose(a, w, y, corrected=False)
    assert split_convex_loss(a, w, y, "mse").l_equiv == pytest.approx(mse.l_equiv, abs=1e-13)


def test_variance():
    a, w, _ = sample(uniform=True)
    np.testing.assert_allclose(variance(a[:, 0, 0], w, True), a[:, 0, 0].var(ddof=1))
    np.testing.assert_allclose(variance(a, w, False), a.var(axis=0))


def halves(seed=0, n=6):
    """Values (2n, 5, 3) whose first and second half differ in mean and in variance; each half weighs ½."""
    rng = np.random.default_rng(seed)
    a = np.concatenate([0.3 + rng.normal(size=(n, 5, 3)), -0.2 + 3.0 * rng.normal(size=(n, 5, 3))])
    w = np.tile(rng.uniform(0.1, 1.0, n), 2)
    return a, w / w.sum(), np.arange(2 * n) >= n


def test_parity_split_is_the_mean_variance_of_the_halves_and_their_distance():
    a, w, improper = halves()
    got = split_by_parity(a, w, improper, corrected=False)
    means, variances = [], []
    for half in (~improper, improper):
        part, share = a[half], w[half] / w[half].sum()
        means.append(np.einsum("k,kna->na", share, part))
        variances.append(np.einsum("k,kna->na", share, (part - means[-1]) ** 2))
    np.testing.assert_allclose(got.proper, sum(variances) / 2, rtol=1e-13)
    np.testing.assert_allclose(got.inversion, (means[0] - means[1]) ** 2 / 4, rtol=1e-12)
    assert abs(variances[0] - variances[1]).min() > 0.1  # one half alone would not do


@pytest.mark.parametrize("corrected", [False, True])
def test_parity_parts_sum_to_the_variance_exactly(corrected):
    a, w, improper = halves()
    if corrected:  # as many improper elements as chance gives, none and all included
        w = np.full(len(a), 1 / len(a))
    for mask in (
        [improper] if not corrected else [improper, improper & (np.arange(12) > 8), improper & False, improper | True]
    ):
        proper, inversion = split_by_parity(a, w, mask, corrected)
        np.testing.assert_allclose(proper + inversion, variance(a, w, corrected), rtol=1e-13)
        torch_parts = split_by_parity(torch.tensor(a), torch.tensor(w), torch.tensor(mask), corrected)
        np.testing.assert_allclose(torch_parts.inversion, inversion, rtol=1e-12, atol=1e-13)


def test_parts_that_are_zero_are_zero_to_rounding_of_themselves():
    """Differences of sums would leave 1e-16 of the other part, whose root is 1e-8 of it."""
    a, w, improper = halves()
    same = np.concatenate([a[:6], a[:6]])  # what inversion does not change
    assert np.sqrt(split_by_parity(same, w, improper, False).inversion.mean()) < 1e-14
    flips = np.where(improper[:, None, None], -1.0, 1.0) * np.ones((12, 5, 3))  # what rotations do not change
    assert np.sqrt(split_by_parity(flips, w, improper, False).proper.mean()) < 1e-14
    assert split_by_parity(flips, w, improper, False).inversion == pytest.approx(1.0)


def test_spreads_of_large_totals_keep_their_digits():
    """Totals of −4000 eV that differ in their last digits: the mean of the whole numbers would be off by as much."""
    ulp = np.spacing(4000.0)
    steps = np.array([0.0, 1.0, 2.0, 1.0, 3.0, 0.0])
    w, improper = np.full(6, 1 / 6), np.arange(6) > 2
    totals = -4000.0 + ulp * steps
    between = (steps[:3].mean() - steps[3:].mean()) ** 2 / 4
    assert variance(totals, w, False) / ulp**2 == pytest.approx(steps.var(), rel=1e-12)
    assert split_by_parity(totals, w, improper, False).inversion / ulp**2 == pytest.approx(between, rel=1e-12)


def test_parity_parts_of_random_elements_are_unbiased():
    """Means ±0.5 and variances 1 and 3 of the halves: proper is 2, inversion 0.25, at K = 4, over many draws."""
    rng = np.random.default_rng(2)
    sums, naive, n_draws = np.zeros(2), 0.0, 2000
    for _ in range(n_draws):
        improper = rng.random(4) < 0.5
        s = np.where(improper, -1.0, 1.0)[:, None]
        a = 0.5 * s + np.where(improper, 3.0, 1.0)[:, None] ** 0.5 * rng.normal(size=(4, 20))
        sums += [part.mean() for part in split_by_parity(a, np.full(4, 0.25), improper, True)]
        naive += (0.25 * (s * a).sum(0) ** 2).mean()  # the diagonal terms left in
    proper, inversion = sums / n_draws
    # Chance of the halves' sizes: both scatter by about 0.9 from draw to draw, 0.02 in the mean.
    assert proper == pytest.approx(2.0, abs=0.1)
    assert inversion == pytest.approx(0.25, abs=0.1)
    assert abs(naive / n_draws - 0.25) > 0.3


def test_a_half_that_weighs_too_much_is_refused():
    a, w, improper = halves()
    with pytest.raises(InputError, match="improper elements weigh 0; expected one half"):
        split_by_parity(a, w, improper & False, False)
    with pytest.raises(InputError, match=r"improper has shape \(3,\); expected \(12,\)"):
        split_by_parity(a, w, improper[:3], False)


def test_percent_of_loss():
    assert percent_of_loss(3.0, 1.0) == 25.0
    assert np.isnan(percent_of_loss(0.0, 0.0))


def test_bad_shapes_are_refused_in_one_line():
    a, w, y = sample()
    with pytest.raises(InputError, match=r"weights have shape \(3,\); expected \(7,\)"):
        decompose(a, w[:3], y, False)
    with pytest.raises(InputError, match=r"expected \(K, N, 3\)"):
        decompose(a[0], w, y, False)
    with pytest.raises(InputError, match="at least 2"):
        decompose(a[:1], w[:1], y, True)
    with pytest.raises(InputError, match="mse, mae, huber, l2"):
        split_convex_loss(a, w, y, "rmse")
