"""A small data set in files, and a recipe that trains on it in a moment."""

import pytest
from ase.io import write
from training_samples import E0, TINY, spring_frames


@pytest.fixture
def folder(tmp_path):
    """A folder with train, valid and test files."""
    for name, n, seed in (("train", 24, 1), ("valid", 6, 2), ("test", 6, 3)):
        write(tmp_path / f"{name}.xyz", spring_frames(n, seed), format="extxyz")
    return tmp_path


@pytest.fixture
def values():
    """A recipe that runs in a moment, as nested mappings; the tests change what they are about."""
    return {
        "name": "tiny",
        "seed": 3,
        "model": dict(TINY["transformer"]),
        "data": {"train": "train.xyz", "valid": "valid.xyz", "isolated_atom_energies": dict(E0)},
        "batch": {"n_frames": 6},
        "schedule": {"warmup_steps": 2},
        "validation": {"symmetry_frames": 2, "n_rotations": 2},
        "steps": 10,
        "dtype": "float64",
        "device": "cpu",
        "n_threads": 1,
    }
