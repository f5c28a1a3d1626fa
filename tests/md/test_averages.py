"""Means along a run and their error bars."""

import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from test_run import Springs, copper, settings

from equimd.errors import InputError
from equimd.frames import labels_of, read_list
from equimd.md import run_md
from equimd.md.averages import Average
from equimd.units import BAR, KB_EV_PER_K


def average(values):
    out = Average()
    for value in values:
        out.add(value)
    return out.mean()


def correlated(rng, n: int, memory: float) -> np.ndarray:
    noise = rng.normal(size=n)
    series = np.zeros(n)
    for k in range(1, n):
        series[k] = memory * series[k - 1] + noise[k]
    return series


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_error_bars_are_the_spread_of_means(memory):
    rng = np.random.default_rng(0)
    means = [average(1e4 + correlated(rng, 2048, memory)) for _ in range(40)]
    spread = np.std([mean.value for mean in means])
    # 40 means know their spread to 11 %; the largest of several estimates lies up to a third above
    assert 0.75 < np.mean([mean.stderr for mean in means]) / spread < 1.6
    naive = np.std(correlated(rng, 2048, memory)) / np.sqrt(2048)
    assert (spread > 2 * naive) == (memory > 0)  # the negative twin: independent samples would say far less


def test_few_values_have_a_mean_and_no_error_bar():
    assert Average().mean() is None
    assert average([1.0, 2.0, 6.0]).value == pytest.approx(3.0)
    assert np.isnan(average(range(15)).stderr)
    assert average(range(16)).stderr > 0
    assert average([7.0] * 40).stderr == 0


def test_npt_reports_volume_density_and_pressure_of_its_frames(tmp_path):
    result = run_md(copper(), EMT(), settings("npt"), tmp_path / "a.h5")
    frames = read_list(tmp_path / "a.h5")
    volumes = np.array([frame.cell.volume for frame in frames])
    assert result.volume_A3.value == pytest.approx(volumes.mean(), rel=1e-12)
    # 1 amu is 1.66054e-24 g and 1 Å³ is 1e-24 cm³
    assert result.density_g_cm3.value == pytest.approx((8 * 63.546 * 1.66053906660 / volumes).mean(), rel=1e-9)
    pressures = [
        -np.trace(labels_of(frame)["stress"]) / 3 + 2 * frame.get_kinetic_energy() / (3 * frame.cell.volume)
        for frame in frames
    ]
    assert result.pressure_bar.value == pytest.approx(np.mean(pressures) / BAR, rel=1e-9)
    assert result.temperature_K.value == pytest.approx(
        np.mean([f.get_temperature() for f in frames]), rel=1e-6
    )  # ASE's kB is older
    assert result.volume_A3.stderr > 0  # 21 frames


def test_the_pressure_of_an_ideal_gas(tmp_path):
    """Its kinetic part alone: N kT / V."""
    atoms = copper()
    calculator = LennardJones(sigma=0.01, epsilon=0.0, rc=0.1)
    result = run_md(atoms, calculator, settings("nve", steps=0), tmp_path / "a.h5")
    kinetic = 24 / 3 * KB_EV_PER_K * 2 * read_list(tmp_path / "a.h5")[0].get_kinetic_energy()
    expected = kinetic / (24 * KB_EV_PER_K) / atoms.cell.volume / BAR
    assert result.pressure_bar.value == pytest.approx(expected, rel=1e-9)


def test_a_slab_has_no_volume_and_a_calculator_without_stress_no_pressure(tmp_path):
    slab = copper()
    slab.pbc = (True, True, False)
    result = run_md(slab, EMT(), settings(steps=3), tmp_path / "slab.h5")
    assert (result.volume_A3, result.density_g_cm3, result.pressure_bar) == (None, None, None)
    result = run_md(copper(), Springs(), settings(steps=3), tmp_path / "springs.h5")
    assert result.volume_A3 is not None
    assert result.pressure_bar is None
    with pytest.raises(InputError, match="npt with a calculator that gives no stress"):
        run_md(copper(), Springs(), settings("npt"), tmp_path / "b.h5")


def test_settings_that_look_like_a_slip_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"the time step is 0\.0005 fs: was it meant in ps"):
        run_md(copper(), Springs(), settings(steps=3, timestep_fs=0.0005), tmp_path / "a.h5")
    with pytest.warns(UserWarning, match="stride is 100 and the run has 3 steps: only its start is stored"):
        run_md(copper(), Springs(), settings(steps=3, stride=100), tmp_path / "b.h5")
    run_md(copper(), Springs(), settings(steps=3, timestep_fs=0.1), tmp_path / "water-Ångström β.h5")  # and no word
    assert len(read_list(tmp_path / "water-Ångström β.h5")) == 2
