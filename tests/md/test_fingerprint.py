"""A run goes on only with the calculator that began it."""

import pytest
import toys
from ase.build import molecule

from equimd import EquimdCalculator
from equimd.errors import InputError
from equimd.frames import read_list
from equimd.md import MDSettings, run_md


def calculator(anisotropy=0.3, **options):
    return EquimdCalculator(toys.ToyPotential(anisotropy=anisotropy), device="cpu", self_check=False, **options)


def settings(steps):
    return MDSettings(steps=steps, stride=2, checkpoint_every=4, temperature_K=50.0, timestep_fs=0.1)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"symmetrize": "canonical"}, "symmetrize"),
    ],
)
def test_another_calculator_is_refused(tmp_path, other, what):
    atoms, path = molecule("CH3CH2OH"), tmp_path / "run.h5"
    run_md(atoms, calculator(), settings(8), path)
    with pytest.raises(InputError, match=f"the calculator's {what} was"):
        run_md(atoms, calculator(**other), settings(12), path, resume=True)
    assert run_md(atoms, calculator(), settings(12), path, resume=True).steps == 12  # and the same one is not


def test_a_randomly_turned_potential_resumes_to_the_last_bit(tmp_path):
    atoms = molecule("CH3CH2OH")
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    run_md(atoms, calculator(symmetrize="random"), settings(12), whole)
    run_md(atoms, calculator(symmetrize="random"), settings(8), parts)
    run_md(atoms, calculator(symmetrize="random"), settings(12), parts, resume=True)
    assert (read_list(whole)[-1].positions == read_list(parts)[-1].positions).all()
    other = tmp_path / "other.h5"
    run_md(atoms, calculator(symmetrize={"mode": "random", "seed": 1}), settings(12), other)
    assert (read_list(whole)[-1].positions != read_list(other)[-1].positions).any()
