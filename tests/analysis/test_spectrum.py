import numpy as np
import pytest
from ase.build import molecule

from equimd.analysis.spectrum import character_spectrum
from equimd.calculators.forcefield import as_force_field, evaluate_rotated
from equimd.decomposition import decompose
from equimd.errors import InputError
from equimd.rotations import quadrature, random_rotations, rotate_back_vectors
from equimd.testing import AnisotropicMock

ATOMS = molecule("CH3CH2OH")
ATOMS.rattle(0.05, seed=0)


def back_rotated(group):
    predicted = evaluate_rotated(as_force_field(AnisotropicMock()), ATOMS, group.rotations)
    return rotate_back_vectors(np.stack(predicted.forces), group.rotations)


def test_spectrum_of_the_mock_is_closed_form():
    group = quadrature(6)
    a = back_rotated(group)
    spectrum, expected = character_spectrum(a, group, l_max=3), AnisotropicMock().spectrum(ATOMS)
    for key, power in spectrum.items():
        if key != (0, 1):
            assert power == pytest.approx(expected.get(key, 0.0), rel=1e-10, abs=1e-12)
    spread = decompose(a, group.weights, None, False).spread.sum()
    assert sum(power for key, power in spectrum.items() if key != (0, 1)) == pytest.approx(spread, rel=1e-9)
    assert spectrum[0, 1] == pytest.approx((decompose(a, group.weights, None, False).mean ** 2).sum())


def test_an_under_integrated_grid_mixes_degrees():
    """Negative twin: the octahedral grid cannot tell l = 3 from l = 1 and l = 2."""
    group = quadrature(3)
    spectrum, expected = character_spectrum(back_rotated(group), group, 3), AnisotropicMock().spectrum(ATOMS)
    assert abs(spectrum[3, -1] / expected[3, -1] - 1) > 1e-2


def test_pure_chirality_is_degree_zero_and_odd():
    group = quadrature(3)
    determinants = np.linalg.det(group.rotations)
    spectrum = character_spectrum(determinants[:, None, None] * np.ones((1, 2, 3)), group, 1)
    assert spectrum[0, -1] == pytest.approx(6.0)
    assert spectrum[0, 1] == pytest.approx(0.0, abs=1e-12)


def test_other_samples_are_refused():
    for group in (quadrature(3, inversion=False), random_rotations(4, 0)):
        with pytest.raises(InputError, match="expected an O\\(3\\) quadrature"):
            character_spectrum(np.zeros((len(group), 2, 3)), group, 2)
