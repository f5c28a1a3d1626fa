import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from equimd.analysis import equivariance as module
from equimd.analysis.equivariance import EquivarianceResult, Extras, equivariance_error, next_degree
from equimd.calculators.forcefield import ASEForceField, Evaluation, as_force_field, evaluate_rotated
from equimd.errors import InputError
from equimd.testing import AnisotropicMock

PLAIN = Extras(floor_frames=0, check_frames=0)


def lennard_jones():
    return LennardJones(sigma=1.0, epsilon=0.05, rc=12.0)


def ethanol(seed):
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def labelled(atoms, forces):
    out = atoms.copy()
    out.calc = SinglePointCalculator(out, energy=0.0, forces=forces)
    return out


class InPrecision(ASEForceField):
    """A calculator whose forces are rounded to float32, with an exact twin."""

    dtype = "float32"

    def __init__(self, calculator, dtype="float32"):
        super().__init__(calculator)
        self.dtype = dtype

    def evaluate(self, frames):
        got = super().evaluate(frames)
        if self.dtype == "float64":
            return got
        return Evaluation(got.energies, [f.astype(np.float32).astype(float) for f in got.forces], got.stresses)

    def with_dtype(self, dtype):
        return InPrecision(self.calculator, dtype)


class Chiral(Calculator):
    """E = c x₀·(x₁ × x₂) from the centroid: invariant under rotations, odd under inversion."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        r = self.atoms.positions - self.atoms.positions.mean(0)
        gradient = np.zeros_like(r)
        gradient[0], gradient[1], gradient[2] = np.cross(r[1], r[2]), np.cross(r[2], r[0]), np.cross(r[0], r[1])
        self.results = {"energy": float(r[0] @ gradient[0]), "forces": -(gradient - gradient.mean(0))}


# --- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"degree": 4}, {"degree": 7}, {"n_rotations": 5}])
def test_lennard_jones_is_equivariant_to_rounding(how):
    result = equivariance_error(lennard_jones(), [ethanol(0), ethanol(1)], extras=PLAIN, **how)
    assert result.force.relative < 1e-12
    assert result.energy.std_per_atom < 1e-12
    assert result.force.net_torque_rms < 1e-12


def test_a_wrong_transpose_is_detected(monkeypatch):
    monkeypatch.setattr(module, "rotate_back", lambda f, r: f @ r.swapaxes(1, 2))
    result = equivariance_error(lennard_jones(), ethanol(0), extras=PLAIN)
    assert result.force.relative > 0.5


def test_a_rotated_cell_that_is_forgotten_is_detected(monkeypatch):
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    good = equivariance_error(EMT(), crystal, n_rotations=4, extras=PLAIN)
    assert good.force.relative < 1e-10
    assert good.stress.rmse_equiv < 1e-12
    assert good.stress.antisymmetric < 1e-12
    assert good.force.net_torque_rms is None

    def forgetful(field, frame, rotations):
        copies = [Atoms(frame, positions=frame.positions @ r.T) for r in rotations]
        return field.evaluate(copies)

    monkeypatch.setattr(module, "evaluate_rotated", forgetful)
    assert equivariance_error(EMT(), crystal, n_rotations=4, extras=PLAIN).force.relative > 0.01


def test_xtb_is_equivariant():
    """The label source as positive control; each copy starts its self-consistent cycle afresh."""
    pytest.importorskip("tblite")
    from equimd.references import label

    class Fresh:
        name, device, dtype = "gfn2-xtb", "cpu", "float64"

        def evaluate(self, frames):
            done = label([f.copy() for f in frames], "gfn2-xtb")
            return Evaluation(
                np.array([f.get_potential_energy() for f in done]), [f.get_forces() for f in done], [None] * len(done)
            )

    result = equivariance_error(Fresh(), ethanol(0), n_rotations=6, extras=PLAIN)
    assert result.force.rmse_equiv < 1e-10


# --- the closed form -------------------------------------------------------------------------------------------------


def test_mock_is_recovered_in_closed_form():
    mock, frames = AnisotropicMock(), [ethanol(0), ethanol(1), molecule("H2O")]
    result = equivariance_error(mock, frames, degree=6, extras=PLAIN)
    spreads = [mock.spread(f) for f in frames]
    expected = np.sqrt(np.concatenate(spreads).mean() / 3)  # pooled over atoms, not the mean of per-frame values
    assert result.force.rmse_equiv == pytest.approx(expected, rel=1e-10)
    assert result.force.rmse_equiv != pytest.approx(np.mean(result.per_frame.rmse_equiv), rel=1e-3)
    energies = [mock.energy_variance(f) / len(f) ** 2 for f in frames]
    assert result.energy.std_per_atom == pytest.approx(np.sqrt(np.mean(energies)), rel=1e-10)
    numbers = np.concatenate([f.numbers for f in frames])
    for symbol, z in (("H", 1), ("C", 6), ("O", 8)):
        value = np.sqrt(np.concatenate(spreads)[numbers == z].mean() / 3)
        assert result.force.per_element[symbol] == pytest.approx(value, rel=1e-10)
    worst = max(range(3), key=lambda i: spreads[i].max())
    assert (result.force.worst_atom.frame, result.force.worst_atom.index) == (worst, spreads[worst].argmax())
    assert result.force.worst_frame.index == np.argmax([s.mean() for s in spreads])
    assert result.force.p95 == pytest.approx(np.percentile([np.sqrt(s.mean() / 3) for s in spreads], 95), rel=1e-10)


def test_an_under_integrated_grid_fails():
    """Negative twin: the spread of an l = 3 energy's forces needs degree 4, that of the energy degree 6."""
    mock, atoms = AnisotropicMock(), ethanol(0)
    coarse = equivariance_error(mock, atoms, degree=3, extras=PLAIN)
    assert abs(coarse.force.rmse_equiv / np.sqrt(mock.spread(atoms).mean() / 3) - 1) > 1e-3
    middle = equivariance_error(mock, atoms, degree=5, extras=PLAIN)
    exact = np.sqrt(mock.energy_variance(atoms)) / len(atoms)
    assert abs(middle.energy.std_per_atom / exact - 1) > 1e-6
    checked = equivariance_error(mock, atoms, degree=3, extras=Extras(check_frames=1))
    assert checked.degree_check.degree == 4
    assert abs(checked.degree_check.relative_change) > 1e-3
    fine = equivariance_error(mock, atoms, degree=4, extras=Extras(check_frames=1))
    assert abs(fine.degree_check.relative_change) < 1e-10
    assert fine.degree_check.degree == next_degree(4) == 6


def test_random_rotations_agree_with_the_closed_form_within_the_error_bar():
    mock = AnisotropicMock()
    frames = [ethanol(0)] * 60  # equal frames: all the scatter is of the rotations, independent per frame
    result = equivariance_error(mock, frames, n_rotations=4, seed=1, extras=PLAIN)
    exact = np.sqrt(mock.spread(frames[0]).mean() / 3)
    assert abs(result.force.rmse_equiv - exact) < 4 * result.force.stderr
    assert 0.005 < result.force.stderr / exact < 0.2
    uncorrected = np.sqrt(np.mean(result.per_frame.s))  # negative twin: K instead of K − 1
    assert abs(uncorrected - exact) > 4 * result.force.stderr
    again = equivariance_error(mock, frames, n_rotations=4, seed=1, extras=PLAIN)
    assert again.force.rmse_equiv == result.force.rmse_equiv
    assert again.group.seed == 1


# --- rotations and inversion apart -----------------------------------------------------------------------------------


class Sum(Calculator):
    """Energies and forces of several calculators added up."""

    implemented_properties = ("energy", "forces")

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        forces = sum(part.get_forces(self.atoms) for part in self.parts)
        self.results = {"energy": sum(p.get_potential_energy(self.atoms) for p in self.parts), "forces": forces}


class FlippedStress(EMT):
    """EMT whose stress has the sign of the cell's handedness, as if the volume were the determinant."""

    def calculate(self, *args, **options):
        super().calculate(*args, **options)
        if "stress" in self.results:
            self.results["stress"] = np.sign(np.linalg.det(self.atoms.cell.array)) * self.results["stress"]


def rms(values):
    return np.sqrt((np.asarray(values) ** 2).mean())


def test_chirality_is_all_inversion():
    atoms = ethanol(0)
    alone = equivariance_error(Chiral(), atoms, inversion=False, extras=PLAIN)
    assert alone.force.relative < 1e-12
    assert alone.force.proper == alone.force.rmse_equiv
    assert alone.force.inversion is None
    both = equivariance_error(Chiral(), atoms, extras=PLAIN)
    # ā = 0 with inversion: all of the force is spread, and all of the energy.
    forces, energy = Chiral().get_forces(atoms), Chiral().get_potential_energy(atoms)
    assert both.force.inversion == pytest.approx(rms(forces), rel=1e-10)
    assert both.force.proper < 1e-12 * both.force.rmse_equiv
    assert both.energy.inversion == pytest.approx(abs(energy) / len(atoms), rel=1e-10)
    assert both.energy.proper < 1e-12 * both.energy.std_per_atom


@pytest.mark.parametrize("coefficients", [(2e-3, 0, 0), (0, 1e-3, 0), (0, 0, 5e-4)])
def test_anisotropy_of_either_parity_is_all_proper(coefficients):
    result = equivariance_error(AnisotropicMock(coefficients), ethanol(0), degree=6, extras=PLAIN)
    assert result.force.proper == pytest.approx(result.force.rmse_equiv, rel=1e-12)
    assert result.force.inversion < 1e-10 * result.force.rmse_equiv
    assert result.energy.inversion < 1e-10 * result.energy.std_per_atom


def test_both_at_once_are_told_apart_and_sum_to_the_whole():
    mock, frames = AnisotropicMock(), [ethanol(0), ethanol(1)]
    result = equivariance_error(Sum(mock, Chiral()), frames, degree=6, extras=PLAIN)
    force, energy = result.force, result.energy
    assert force.proper == pytest.approx(rms([np.sqrt(mock.spread(f).mean() / 3) for f in frames]), rel=1e-10)
    assert force.inversion == pytest.approx(rms([Chiral().get_forces(f) for f in frames]), rel=1e-10)
    assert force.rmse_equiv**2 == pytest.approx(force.proper**2 + force.inversion**2, rel=1e-13)
    assert energy.std_per_atom**2 == pytest.approx(energy.proper**2 + energy.inversion**2, rel=1e-12)
    assert result.per_frame.inversion_squared == pytest.approx([rms(Chiral().get_forces(f)) ** 2 for f in frames])


def test_parts_from_random_rotations_agree_within_their_error_bars():
    mock, frames = AnisotropicMock(), [ethanol(0)] * 60
    force = equivariance_error(Sum(mock, Chiral()), frames, n_rotations=4, seed=1, extras=PLAIN).force
    proper, inversion = np.sqrt(mock.spread(frames[0]).mean() / 3), rms(Chiral().get_forces(frames[0]))
    assert abs(force.proper - proper) < 4 * force.proper_stderr < proper
    assert abs(force.inversion - inversion) < 4 * force.inversion_stderr < inversion
    assert force.rmse_equiv**2 == pytest.approx(force.proper**2 + force.inversion**2, rel=1e-12)
    # Nothing there: the estimate of the square scatters about zero, and the error bar covers it.
    nothing = equivariance_error(mock, frames, n_rotations=4, seed=1, extras=PLAIN).force
    assert nothing.inversion < 4 * nothing.inversion_stderr
    assert min(equivariance_error(mock, frames, n_rotations=4, extras=PLAIN).per_frame.inversion_squared) < 0


def test_a_stress_that_flips_under_inversion_is_found_though_forces_are_exact():
    crystal = bulk("Cu", a=3.5, cubic=True)
    crystal.rattle(0.1, seed=0)
    result = equivariance_error(FlippedStress(), crystal, degree=3, extras=Extras(check_frames=0))
    expected = rms(ASEForceField(EMT()).evaluate([crystal]).stresses[0])
    assert result.force.at_floor
    assert result.stress.inversion == pytest.approx(expected, rel=1e-10)
    assert result.stress.proper < 1e-10 * expected
    assert result.stress.relative == pytest.approx(1.0)
    assert result.stress.rmse_equiv_gpa == pytest.approx(160.21766 * expected, rel=1e-6)
    assert not result.stress.at_floor
    right = equivariance_error(EMT(), crystal, degree=3, extras=Extras(check_frames=0)).stress  # negative twin
    assert right.at_floor
    assert right.relative < 1e-12


def test_labels_that_are_the_potentials_own_are_called_suspicious():
    mock, frames = AnisotropicMock(), [ethanol(0), ethanol(1)]
    own = [labelled(f, mock.get_forces(f).astype(np.float32)) for f in frames]
    result = equivariance_error(mock, own, degree=3, extras=PLAIN)
    assert "2 of 2 labelled frames is zero to rounding" in result.loss.suspicious
    other = [labelled(f, lennard_jones().get_forces(f)) for f in frames]  # off by the anisotropy alone
    assert equivariance_error(mock, other, degree=3, extras=PLAIN).loss.suspicious is None


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"degree": 4}, {"n_rotations": 3}])
def test_percent_of_loss_is_pooled_and_the_identity_holds(how):
    mock = AnisotropicMock()
    frames = [ethanol(0), ethanol(1), molecule("H2O")]
    offsets = [0.001, 0.1, 0.01]
    frames = [
        labelled(f, as_force_field(lennard_jones()).evaluate([f]).forces[0] + d)
        for f, d in zip(frames, offsets, strict=True)
    ]
    result = equivariance_error(mock, frames, extras=PLAIN, **how)
    loss, per_frame = result.loss, result.per_frame
    assert loss.l_total == pytest.approx(loss.l_mean + loss.l_equiv, abs=1e-12)
    assert loss.l_equiv == pytest.approx(result.force.rmse_equiv**2, abs=1e-15)
    assert loss.percent_of_loss == pytest.approx(100 * loss.l_equiv / loss.l_total, rel=1e-12)
    n, k = np.array(per_frame.n_atoms), np.array(per_frame.n_rotations)
    s, m = np.array(per_frame.s), np.array(per_frame.mean_error_squared)
    equiv, mean = (k / (k - 1) * s, m - s / (k - 1)) if "n_rotations" in how else (s, m)
    assert loss.l_mean == pytest.approx(n @ mean / n.sum(), rel=1e-9)  # everything can be recomputed
    assert loss.l_equiv == pytest.approx(n @ equiv / n.sum(), rel=1e-9)
    averaged = np.mean(100 * equiv / (equiv + mean))  # negative twin
    assert abs(averaged - loss.percent_of_loss) > 1.0


def test_l_mean_is_what_was_built_in():
    mock, atoms = AnisotropicMock(), ethanol(0)
    twirled = as_force_field(lennard_jones()).evaluate([atoms]).forces[0]
    result = equivariance_error(mock, labelled(atoms, twirled + 0.02), degree=4, extras=PLAIN)
    assert result.loss.l_mean == pytest.approx(0.02**2, rel=1e-10)
    reference = equivariance_error(mock, atoms, degree=4, reference=lennard_jones(), extras=PLAIN)
    assert reference.loss.l_mean < 1e-24
    assert reference.loss.percent_of_loss == pytest.approx(100.0)


def test_a_named_reference_labels_the_frames():
    pytest.importorskip("tblite")
    result = equivariance_error(lennard_jones(), molecule("H2O"), n_rotations=2, reference="gfn2-xtb", extras=PLAIN)
    assert result.loss.l_mean > 0.1


def test_without_labels_there_is_no_loss_and_some_labels_count():
    assert equivariance_error(lennard_jones(), ethanol(0), extras=PLAIN).loss is None
    some = equivariance_error(lennard_jones(), [ethanol(0), labelled(ethanol(1), np.zeros((9, 3)))], extras=PLAIN)
    assert some.loss.n_frames == 1
    assert some.per_frame.mean_error_squared[0] is None


# --- the floor -------------------------------------------------------------------------------------------------------


def test_floor_is_the_rounding_and_decides():
    frames = [ethanol(i) for i in range(3)]
    exact = equivariance_error(InPrecision(lennard_jones()), frames, extras=Extras(floor_frames=2, check_frames=0))
    # Rounding to float32: some 3e-8 relative.
    assert 1e-9 < exact.force.floor / exact.force.rms_force < 1e-7
    assert exact.force.floor_frames == 2
    assert exact.force.at_floor
    broken = equivariance_error(InPrecision(AnisotropicMock()), frames, extras=Extras(check_frames=0))
    assert broken.force.floor is not None
    assert not broken.force.at_floor


def test_floor_is_measured_where_there_are_two_precisions_and_estimated_where_not():
    for field, kind in (
        (InPrecision(lennard_jones()), "measured"),
        (InPrecision(lennard_jones(), "float64"), "estimated"),
    ):
        force = equivariance_error(field, ethanol(0), degree=3, extras=Extras(check_frames=0)).force
        assert force.floor_kind == kind
        assert force.floor > 0
    none = equivariance_error(lennard_jones(), ethanol(0), degree=3, extras=PLAIN).force
    assert (none.floor, none.floor_kind, none.at_floor) == (None, None, False)
    field = ASEForceField(lennard_jones())
    field.stochastic = True  # its noise is meant: no rounding
    assert equivariance_error(field, ethanol(0), degree=3, extras=Extras(check_frames=0)).force.floor is None


# --- the interface ---------------------------------------------------------------------------------------------------


def test_batches_are_used_where_offered_and_give_the_same():
    class Batched(ASEForceField):
        sizes: list = []

        def evaluate_rotated(self, frame, rotations):
            self.sizes.append(len(rotations))
            return evaluate_rotated(ASEForceField(self.calculator), frame, rotations)

    batched = Batched(AnisotropicMock())
    got = equivariance_error(batched, ethanol(0), extras=Extras(0, 0, atoms_per_batch=9 * 50))
    assert batched.sizes == [50, 50, 20]
    assert got.force.rmse_equiv == equivariance_error(AnisotropicMock(), ethanol(0), extras=PLAIN).force.rmse_equiv


def test_frames_stay_as_they_are_and_constraints_do_not_matter():
    frame = ethanol(0)
    frame.set_constraint(FixAtoms([0, 1, 2]))
    before = frame.copy()
    done = []
    result = equivariance_error(AnisotropicMock(), [frame, frame], extras=PLAIN, progress=lambda *a: done.append(a))
    assert frame == before
    assert len(frame.constraints) == 1
    assert done == [(1, 2), (2, 2)]
    free = equivariance_error(AnisotropicMock(), [ethanol(0)], extras=PLAIN)
    assert result.force.rmse_equiv == pytest.approx(free.force.rmse_equiv, rel=1e-14)


def test_json_has_the_promised_fields_and_can_be_read_again():
    frame = labelled(ethanol(0), np.zeros((9, 3)))
    result = equivariance_error(AnisotropicMock(), frame, degree=3)
    data = json.loads(result.to_json())
    assert data["schema_version"] == 1
    assert data["n_frames"] == 1
    assert {"kind", "degree", "inversion", "n_rotations"} <= set(data["group"])
    force = ["rmse_equiv", "relative", "stderr", "p95", "worst_frame", "worst_atom", "floor", "at_floor", "per_element"]
    assert set(force) <= set(data["force"])
    assert data["force"]["stderr"] is None  # one frame has no error bar: null, never NaN
    assert "std_per_atom" in data["energy"]
    assert {"l_total", "l_mean", "l_equiv", "percent_of_loss"} <= set(data["loss"])
    assert {"rmse_equiv", "s", "mean_error_squared", "n_rotations"} <= set(data["per_frame"])
    again = EquivarianceResult.model_validate_json(result.to_json())
    assert again.to_json() == result.to_json()


def test_bad_input_is_refused_in_one_line():
    broken = ethanol(0)
    broken.positions[3, 1] = np.nan
    for frames, message in (
        ([], "0 frames given"),
        ([Atoms()], "frame 0 has 0 atoms"),
        ([ethanol(0), broken], "frame 1, atom 3 is at .*expected finite positions"),
    ):
        with pytest.raises(InputError, match=message):
            equivariance_error(lennard_jones(), frames)
    with pytest.raises(InputError, match="n_rotations is 1"):
        equivariance_error(lennard_jones(), ethanol(0), n_rotations=1)
    with pytest.raises(InputError, match="quadrature degree is 99"):
        equivariance_error(lennard_jones(), ethanol(0), degree=99)
    with pytest.raises(InputError, match="int is not a force field"):
        equivariance_error(3, ethanol(0))
