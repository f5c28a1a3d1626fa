import itertools

import numpy as np
import pytest
import torch
from e3nn import o3

from equimd.kernels.wigner import wigner_3j

TRIPLES = [(a, b, c) for a, b, c in itertools.product(range(5), repeat=3) if abs(a - b) <= c <= a + b]


def test_symbols_are_those_of_e3nn():
    for triple in TRIPLES:
        theirs = o3.wigner_3j(*triple, dtype=torch.float64).numpy()
        np.testing.assert_allclose(wigner_3j(*triple), theirs, atol=1e-14, err_msg=str(triple))  # rounding: 3e-16


@pytest.mark.parametrize("triple", [(2, 1, 3), (3, 3, 2), (6, 5, 4)])
def test_symbols_are_equivariant(triple):
    """Each index rotated by the matrix of its degree leaves them as they are; by that of another rotation does not."""
    angles = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)
    rotations = [o3.wigner_D(degree, *angles).numpy() for degree in triple]
    symbols = wigner_3j(*triple)
    turned = np.einsum("ai,bj,ck,ijk->abc", *rotations, symbols)
    np.testing.assert_allclose(turned, symbols, atol=1e-6)  # e3nn's matrices are rounded to float32
    rotations[0] = o3.wigner_D(triple[0], *(angles + 0.1)).numpy()
    assert np.abs(np.einsum("ai,bj,ck,ijk->abc", *rotations, symbols) - symbols).max() > 1e-2


def test_what_does_not_couple_is_zero():
    assert not wigner_3j(1, 1, 3).any()
