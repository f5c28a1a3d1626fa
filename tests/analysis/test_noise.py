"""The estimated floor: what is rounding and what is not, for calculators that do not say how they compute."""

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from equimd.analysis.equivariance import Extras, equivariance_error
from equimd.calculators.forcefield import ASEForceField, Evaluation
from equimd.contract import subject
from equimd.report.verdict import judge
from equimd.testing import AnisotropicMock

FLOOR = Extras(floor_frames=8, check_frames=0)


def lennard_jones():
    return LennardJones(sigma=1.0, epsilon=0.05, rc=12.0)


def ethanol(seed=0):
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def copper():
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    return crystal


def measured(field, frame, n_rotations=12):
    return equivariance_error(field, frame, n_rotations=n_rotations, extras=FLOOR)


class Single(ASEForceField):
    """A calculator that computes in float32 and does not say so: positions and forces are rounded."""

    def evaluate(self, frames):
        rounded = [frame.copy() for frame in frames]
        for frame in rounded:
            frame.positions = frame.positions.astype(np.float32)
        got = super().evaluate(rounded)
        return Evaluation(got.energies, [f.astype(np.float32).astype(float) for f in got.forces], got.stresses)


class Noisy(ASEForceField):
    """Forces with normal noise of this width."""

    def __init__(self, calculator, width):
        super().__init__(calculator)
        self.width, self.rng = width, np.random.default_rng(0)

    def evaluate(self, frames):
        got = super().evaluate(frames)
        return got.__class__(
            got.energies, [f + self.width * self.rng.normal(size=f.shape) for f in got.forces], got.stresses
        )


class Converging(Noisy):
    """As a self-consistent cycle: the error of the last call stays as long as atoms hardly move."""

    last = None

    def evaluate(self, frames):
        out = []
        for frame in frames:
            if self.last is None or np.abs(frame.positions - self.last).max() > 1e-2:
                self.error = self.width * self.rng.normal(size=(len(frame), 3))
            self.last = frame.positions.copy()
            out.append(ASEForceField.evaluate(self, [frame]))
        return Evaluation(
            np.concatenate([e.energies for e in out]), [e.forces[0] + self.error for e in out], [None] * len(out)
        )


@pytest.mark.parametrize(
    ("field", "frame", "size"),
    [
        (lennard_jones(), ethanol(), 1e-15),
        (EMT(), copper(), 1e-14),
        (Single(lennard_jones()), ethanol(), 3e-7),
    ],
)
def test_equivariant_calculators_are_exact_whatever_they_compute_in(field, frame, size):
    result = measured(field, frame)
    force = result.force
    assert force.floor_kind == "estimated"
    # The estimate is of rounding, so a few times either way of what rotations show; three floors leave room for it.
    assert size / 10 < force.floor < 10 * size
    assert force.floor / 3 < force.rmse_equiv < 2 * force.floor
    verdict = judge(result)
    assert verdict.level == "exact"
    assert verdict.text.endswith("exact: at the rounding floor (estimated)")


@pytest.mark.parametrize(
    ("wrap", "scale"),
    [(ASEForceField, 1.0), (ASEForceField, 1e-3), (ASEForceField, 1e-10), (Single, 1.0), (Single, 1e-3)],
)
def test_broken_symmetry_is_never_exact(wrap, scale):
    """Negative twin, down to a few times what each precision resolves."""
    result = measured(wrap(AnisotropicMock((2e-3 * scale, 1e-3 * scale, 5e-4 * scale))), ethanol())
    assert not result.force.at_floor
    assert judge(result).level != "exact"


def test_a_noisy_calculator_is_at_its_floor_and_not_exact():
    result = measured(Noisy(lennard_jones(), 1e-3), [ethanol(k) for k in range(4)])
    # The median of 4 frames of 27 components, three differences each that share most points.
    assert result.force.floor == pytest.approx(1e-3, rel=0.3)
    assert result.force.at_floor
    verdict = judge(result)
    assert verdict.level == "unknown"
    assert "not above the calculator's own noise of" in verdict.text
    # Negative twin: broken symmetry of ten times the noise.
    assert not measured(Noisy(AnisotropicMock((2e-2, 1e-2, 5e-3)), 1e-3), ethanol()).force.at_floor


def test_history_of_a_self_consistent_cycle_counts(monkeypatch):
    assert measured(Converging(lennard_jones(), 1e-5), ethanol()).force.at_floor
    # Negative twin: points one after the other start from each other's error and see none.
    monkeypatch.setattr(subject, "turned", lambda structure, _: structure)
    assert not measured(Converging(lennard_jones(), 1e-5), ethanol()).force.at_floor


class HardCutoff(ASEForceField):
    """Two atoms attract each other by one more unit as long as they are closer than 2e-6 Å more than now."""

    def __init__(self, calculator, atoms):
        super().__init__(calculator)
        self.cutoff = atoms.get_distance(0, 5) + 2e-6

    def evaluate(self, frames):
        got = super().evaluate(frames)
        for frame, forces in zip(frames, got.forces, strict=True):
            arm = frame.positions[5] - frame.positions[0]
            if np.linalg.norm(arm) < self.cutoff:
                forces[[0, 5]] += 0.1 * np.array([arm, -arm])
        return got


def test_a_pair_that_crosses_a_cutoff_is_no_rounding(monkeypatch):
    atoms = molecule("C60")
    atoms.rattle(0.05, seed=0)
    assert measured(HardCutoff(lennard_jones(), atoms), atoms, n_rotations=4).force.floor < 1e-12
    broken = HardCutoff(AnisotropicMock((2e-7, 1e-7, 5e-8)), atoms)
    assert not measured(broken, atoms, n_rotations=4).force.at_floor
    monkeypatch.setattr(subject, "_LEFT_OUT", 0.0)  # negative twin
    assert measured(broken, atoms, n_rotations=4).force.at_floor


def test_first_differences_would_take_slopes_for_rounding(monkeypatch):
    broken = AnisotropicMock((2e-6, 1e-6, 5e-7))
    assert not measured(broken, ethanol()).force.at_floor
    monkeypatch.setattr(subject, "_ORDER", 1)
    assert measured(broken, ethanol()).force.at_floor


def test_energy_and_stress_have_floors_too():
    frames = [copper() for _ in range(8)]
    for k, frame in enumerate(frames):
        frame.rattle(0.05, seed=k)  # an energy is one number a frame: its rounding shows over several only
    result = measured(EMT(), frames)
    assert result.energy.at_floor
    assert result.stress.at_floor
    assert 0 < result.stress.floor < 1e-15
    broken = measured(AnisotropicMock(), ethanol()).energy
    assert 0 < broken.floor < 1e-15
    assert not broken.at_floor


def test_tight_binding_is_exact():
    pytest.importorskip("tblite")
    from equimd.references import reference_calculator

    result = measured(reference_calculator("gfn2-xtb"), molecule("H2O"), n_rotations=6)
    assert judge(result).level == "exact"
