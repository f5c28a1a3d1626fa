"""A comparison made up from numbers of the expected size, for pages and tables without simulations."""

import numpy as np

from equimd.analysis.accuracy import AccuracyResult, Errors
from equimd.analysis.conservation import nve_drift
from equimd.analysis.equivariance_results import (
    DegreeCheck,
    EnergySpread,
    EquivarianceResult,
    ForceSpread,
    Group,
    LossShare,
    PerFrame,
    WorstAtom,
    WorstFrame,
)
from equimd.analysis.throughput import ThroughputResult, Timing, TimingSettings
from equimd.report.comparison import (
    CompareResult,
    CompareSettings,
    EnergySeries,
    Parity,
    PotentialResult,
    Trajectory,
)
from equimd.report.verdict import in_words, judge
from equimd.results import provenance

N_FRAMES, N_ATOMS = 50, 9


def make_result(*, names=("ethanol-equivariant", "ethanol-transformer"), symmetry=(2e-7, 3e-3)) -> CompareResult:
    """Two potentials with force errors of 5 and 20 meV/Å and the given symmetry errors in eV/Å."""
    errors, families, speeds = (6e-3, 22e-3, 15e-3), ("equivariant", "transformer", "transformer"), (6.0, 4.1, 9.0)
    potentials = [
        make_potential(name, families[k % 3], symmetry[k], errors[k % 3], speeds[k % 3], seed=k)
        for k, name in enumerate(names)
    ]
    return CompareResult(
        formula="C2H6O",
        n_atoms=N_ATOMS,
        periodic=False,
        reference="gfn2-xtb",
        settings=CompareSettings(),
        potentials=potentials,
        verdict=in_words(potentials),
        wall_seconds=112.0,
        provenance=provenance(n_threads=2),
    )


def make_potential(name: str, family: str, symmetry: float, error: float, ms: float, seed: int = 0) -> PotentialResult:
    rng = np.random.default_rng(seed)
    equivariance = make_equivariance(name, symmetry, error, rng)
    per_frame = equivariance.per_frame
    times = 10.0 * (1 + np.arange(N_FRAMES))
    nve_times = 0.5 * np.arange(2001)
    energies = 1e-4 * rng.normal(size=2001) + 3e-4 * np.sin(nve_times / 4.0)
    drift = nve_drift(nve_times, energies, N_ATOMS)
    force_rmse = np.sqrt(error**2 * (1 + 0.2 * rng.normal(size=N_FRAMES)) ** 2)
    reference = 1.3 * rng.normal(size=1500)
    accuracy = make_accuracy(name, error)
    return PotentialResult(
        name=name,
        family=family,
        accuracy=accuracy,
        accuracy_own=accuracy,
        equivariance=equivariance,
        nve=drift,
        throughput=make_throughput(name, ms),
        verdict=judge(equivariance),
        training_device_hours=0.83,
        n_parameters=212_344,
        trajectory=Trajectory(
            times_fs=times.tolist(),
            temperature_K=(300 + 60 * rng.normal(size=N_FRAMES)).tolist(),
            rmse_equiv=per_frame.rmse_equiv,
            force_rmse=force_rmse.tolist(),
            percent_of_loss=(100 * np.array(per_frame.rmse_equiv) ** 2 / force_rmse**2).tolist(),
        ),
        nve_energy=EnergySeries(
            times_fs=nve_times[::4].tolist(), mev_per_atom=(1e3 * energies[::4] / N_ATOMS).tolist()
        ),
        parity=Parity(
            reference=reference.tolist(), predicted=(reference + error * rng.standard_t(4, size=1500)).tolist()
        ),
    )


def make_equivariance(name: str, symmetry: float, error: float, rng: np.random.Generator) -> EquivarianceResult:
    per_frame = symmetry * np.exp(0.3 * rng.normal(size=N_FRAMES))
    l_equiv = float((per_frame**2).mean())
    rmse, floor = l_equiv**0.5, 1.9e-7
    return EquivarianceResult(
        name=name,
        device="cpu",
        dtype="float32",
        n_frames=N_FRAMES,
        group=Group(kind="quadrature", degree=4, inversion=True, n_rotations=120),
        force=ForceSpread(
            rmse_equiv=rmse,
            relative=rmse / 1.3,
            stderr=0.05 * rmse,
            proper=0.96 * rmse,
            proper_stderr=0.05 * rmse,
            inversion=0.28 * rmse,
            inversion_stderr=0.02 * rmse,
            p95=float(np.percentile(per_frame, 95)),
            worst_frame=WorstFrame(index=int(per_frame.argmax()), rmse_equiv=float(per_frame.max())),
            worst_atom=WorstAtom(frame=3, index=2, element="O", rmse_equiv=3 * rmse),
            floor=floor,
            at_floor=rmse < 3 * floor,
            floor_kind="measured",
            floor_frames=8,
            per_element={"C": 1.2 * rmse, "H": 0.7 * rmse, "O": 1.8 * rmse},
            rms_force=1.3,
            net_torque_rms=2 * rmse,
        ),
        energy=EnergySpread(std_per_atom=rmse / 10),
        stress=None,
        loss=LossShare(
            n_frames=N_FRAMES,
            l_total=error**2 + l_equiv,
            l_mean=error**2,
            l_equiv=l_equiv,
            percent_of_loss=100 * l_equiv / (error**2 + l_equiv),
            stderr=4 * l_equiv / (error**2 + l_equiv),
            correlation_with_force_error=0.4,
        ),
        degree_check=DegreeCheck(degree=6, n_frames=1, rmse_equiv=rmse, relative_change=2e-3),
        per_frame=PerFrame(
            n_atoms=[N_ATOMS] * N_FRAMES,
            n_rotations=[120] * N_FRAMES,
            rmse_equiv=per_frame.tolist(),
            s=(per_frame**2).tolist(),
            mean_error_squared=[error**2] * N_FRAMES,
            mean_force_squared=[1.7] * N_FRAMES,
            energy_variance=[0.0] * N_FRAMES,
            floor=[None] * N_FRAMES,
        ),
        provenance=provenance(n_threads=2),
    )


def make_accuracy(name: str, error: float) -> AccuracyResult:
    def errors(scale: float) -> Errors:
        return Errors(mae=0.75 * scale, rmse=scale)

    return AccuracyResult(
        name=name,
        device="cpu",
        dtype="float32",
        n_frames=2 * N_FRAMES,
        n_energies=2 * N_FRAMES,
        n_forces=2 * N_FRAMES,
        n_stresses=0,
        energy_per_atom=errors(error / 30),
        energy=errors(error / 3),
        force=errors(error),
        stress=None,
        energy_shift_per_atom=1e-5,
        force_per_element={"C": errors(1.3 * error), "H": errors(0.7 * error), "O": errors(1.5 * error)},
        force_label_rms=1.3,
        provenance=provenance(n_threads=2),
    )


def make_throughput(name: str, ms: float) -> ThroughputResult:
    return ThroughputResult(
        name=name,
        n_atoms=N_ATOMS,
        device="cpu",
        dtype="float32",
        timestep_fs=0.5,
        unstable=False,
        ms_per_step=Timing(median=ms, spread=0.04),
        ms_per_forward=Timing(median=0.9 * ms, spread=0.03),
        steps_per_s=1e3 / ms,
        ns_per_day=43.2 / ms,
        us_per_atom_step=1e3 * ms / N_ATOMS,
        atom_steps_per_device_hour=N_ATOMS * 3.6e6 / ms,
        ns_per_device_hour=1.8 / ms,
        peak_memory_mib=640.0,
        n_devices=1,
        n_evaluations=1000,
        settings=TimingSettings(),
        provenance=provenance(n_threads=2),
    )
