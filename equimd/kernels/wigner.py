"""Wigner 3j symbols of real spherical harmonics, in e3nn's order, signs and normalisation.

Racah's formula gives the Clebsch-Gordan coefficients of complex harmonics (Varshalovich, Moskalev & Khersonskii,
Quantum Theory of Angular Momentum, 1988, section 8.2). Unitary matrices lead from there to real harmonics.
"""

import functools
import math

import numpy as np


def wigner_3j(l1: int, l2: int, l3: int) -> np.ndarray:
    """Real symbols of norm 1, (2·l1+1, 2·l2+1, 2·l3+1) float64; zero where none of the three couple."""
    complex_symbols = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(-l2, l2 + 1):
            if abs(m1 + m2) <= l3:
                complex_symbols[l1 + m1, l2 + m2, l3 + m1 + m2] = _racah(l1, m1, l2, m2, l3)
    bases = _real_basis(l1), _real_basis(l2), _real_basis(l3).conj()
    symbols = np.einsum("ij,kl,mn,ikm->jln", *bases, complex_symbols).real
    norm = np.linalg.norm(symbols)
    return symbols / norm if norm else symbols


@functools.cache
def _real_basis(l: int) -> np.ndarray:  # noqa: E741
    """Complex harmonics (rows, m = −l … l) in terms of real ones (columns), with a phase of (−i)^l for real symbols."""
    q = np.zeros((2 * l + 1, 2 * l + 1), complex)
    q[l, l] = 1
    for m in range(1, l + 1):
        q[l - m, l + m], q[l - m, l - m] = math.sqrt(0.5), -1j * math.sqrt(0.5)
        q[l + m, l + m], q[l + m, l - m] = (-1) ** m * math.sqrt(0.5), 1j * (-1) ** m * math.sqrt(0.5)
    return (-1j) ** l * q


def _racah(l1: int, m1: int, l2: int, m2: int, l3: int) -> float:
    """⟨l1 m1 l2 m2 | l3 m1+m2⟩, zero if the three do not make a triangle; integers are exact until the root."""
    m3, f = m1 + m2, math.factorial
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        return 0.0
    total = 0.0
    for k in range(l1 + l2 - l3 + 1):
        below = (l1 + l2 - l3 - k, l1 - m1 - k, l2 + m2 - k, l3 - l2 + m1 + k, l3 - l1 - m2 + k)
        if min(below) >= 0:
            total += (-1) ** k / (f(k) * math.prod(map(f, below)))
    triangle = f(l1 + l2 - l3) * f(l1 - l2 + l3) * f(-l1 + l2 + l3) / f(l1 + l2 + l3 + 1)
    rows = math.prod(f(l + m) * f(l - m) for l, m in ((l1, m1), (l2, m2), (l3, m3)))  # noqa: E741
    return total * math.sqrt((2 * l3 + 1) * triangle * rows)
