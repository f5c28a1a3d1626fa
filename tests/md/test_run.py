"""MD: resumed runs equal uninterrupted ones, explosions end in words, bad input is refused."""

import subprocess
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

from equimd.errors import InputError
from equimd.frames import labels_of, read_list
from equimd.md import MDSettings, iterate_md, run_md
from equimd.md.integrators import Integrator
from equimd.md.settings import make_settings
from equimd.units import ASE_TIME_FS, KJ_PER_MOL

ENSEMBLES = ("nve", "nvt", "npt")


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.rattle(0.02, seed=0)
    return atoms


class Springs(Calculator):
    """Every atom on a spring of 5 eV/Å² to where it was first seen: fast, and its temperature is known exactly."""

    name = "springs"
    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    origin = None

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        """Energy and forces of the springs."""
        super().calculate(atoms, properties, system_changes)
        self.origin = self.atoms.positions.copy() if self.origin is None else self.origin
        away = self.atoms.positions - self.origin
        self.results = {"energy": 2.5 * float((away**2).sum()), "forces": -5.0 * away}


def settings(ensemble: str = "nvt", **changes) -> MDSettings:
    values = {"steps": 60, "timestep_fs": 2.0, "stride": 3, "checkpoint_every": 20, "seed": 3}
    return make_settings(ensemble=ensemble, **(values | changes))


def numbers(frames: list[Atoms]) -> np.ndarray:
    """Everything that a frame of a trajectory holds, (frames, values)."""
    rows = []
    for atoms in frames:
        labels = labels_of(atoms)
        parts = [atoms.positions, atoms.get_momenta(), labels["forces"], atoms.cell.array, labels["stress"]]
        rows.append(
            np.concatenate([[labels["energy"], atoms.info["step"], atoms.info["time_fs"]], *map(np.ravel, parts)])
        )
    return np.array(rows)


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


class Interrupted(EMT):
    """EMT that dies at its n-th evaluation."""

    name = "emt"

    def __init__(self, calls: int):
        super().__init__()
        self.left = calls

    def calculate(self, *args, **kwargs):
        """As EMT, until the calls are used up."""
        self.left -= 1
        if self.left < 0:
            raise Killed
        super().calculate(*args, **kwargs)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("suffix", [".h5", ".xyz"])
def test_a_resumed_run_equals_one_that_was_never_interrupted(tmp_path, ensemble, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    run_md(copper(), EMT(), settings(ensemble), whole)
    with pytest.raises(Killed):
        run_md(copper(), Interrupted(48), settings(ensemble), cut)
    assert 0 < len(read_list(cut)) < 21
    result = run_md(copper(), EMT(), settings(ensemble), cut, resume=True)
    expected = numbers(read_list(whole))
    np.testing.assert_array_equal(numbers(read_list(cut)), expected)
    assert (result.steps, result.n_frames, result.stopped) == (60, 21, None)
    assert len(expected) == 21
    if suffix == ".xyz":
        assert whole.read_bytes() == cut.read_bytes()


def test_without_the_generator_a_resumed_run_differs(tmp_path, monkeypatch):
    """The negative twin: the comparison above sees a thermostat that starts its random numbers again."""
    run_md(copper(), EMT(), settings(), tmp_path / "whole.h5")
    with pytest.raises(Killed):
        run_md(copper(), Interrupted(48), settings(), tmp_path / "cut.h5")
    monkeypatch.setattr(Integrator, "restore", lambda self, state: None)
    run_md(copper(), EMT(), settings(), tmp_path / "cut.h5", resume=True)
    difference = numbers(read_list(tmp_path / "cut.h5")) - numbers(read_list(tmp_path / "whole.h5"))
    assert not difference[:7].any()
    assert np.abs(difference[-1]).max() > 1e-3


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import equimd.frames.transaction as transaction, equimd.md.run as run
from test_run import EMT, copper, settings
moment, left = sys.argv[2], int(sys.argv[3])
def dying(function):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
if moment == "forces":
    EMT.calculate = dying(EMT.calculate)
elif moment == "sync":
    transaction._sync = dying(transaction._sync)
else:
    os.replace = dying(os.replace)
run.run_md(copper(), EMT(), settings(), sys.argv[1])
"""


@pytest.mark.parametrize(
    ("moment", "left"), [("forces", 0), ("forces", 50), ("sync", 3), ("replace", 0), ("replace", 3)]
)
def test_a_killed_process_is_resumed_without_a_difference(tmp_path, moment, left):
    run_md(copper(), EMT(), settings(), tmp_path / "whole.h5")
    code = KILLED.format(tests=str(__file__).rsplit("/", 1)[0])
    command = [sys.executable, "-c", code, str(tmp_path / "cut.h5"), moment, str(left)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    run_md(copper(), EMT(), settings(), tmp_path / "cut.h5", resume=True)
    np.testing.assert_array_equal(numbers(read_list(tmp_path / "cut.h5")), numbers(read_list(tmp_path / "whole.h5")))


def test_a_finished_run_goes_on_as_a_longer_one_would_have(tmp_path):
    run_md(copper(), EMT(), settings(steps=90), tmp_path / "long.h5")
    run_md(copper(), EMT(), settings(steps=50), tmp_path / "short.h5")
    run_md(copper(), EMT(), settings(steps=90), tmp_path / "short.h5", resume=True)
    np.testing.assert_array_equal(numbers(read_list(tmp_path / "short.h5")), numbers(read_list(tmp_path / "long.h5")))


def test_iterating_gives_the_frames_of_the_trajectory(tmp_path):
    run_md(copper(), EMT(), settings(), tmp_path / "a.h5")
    frames = list(iterate_md(copper(), EMT(), settings()))
    stored = read_list(tmp_path / "a.h5")
    assert [step for step, _ in frames] == [atoms.info["step"] for atoms in stored] == list(range(0, 61, 3))
    for (_, atoms), other in zip(frames, stored, strict=True):
        np.testing.assert_array_equal(atoms.positions, other.positions)
        # H5MD has forces in kJ/mol/Å: two roundings.
        np.testing.assert_allclose(labels_of(atoms)["forces"], labels_of(other)["forces"], rtol=5e-16, atol=0)


def test_the_seed_decides_the_trajectory_and_the_input_is_left_alone(tmp_path):
    atoms = copper()
    before = atoms.copy()
    last = [list(iterate_md(atoms, EMT(), settings(seed=seed)))[-1][1].positions for seed in (1, 1, 2)]
    np.testing.assert_array_equal(last[0], last[1])
    assert np.abs(last[0] - last[2]).max() > 1e-3
    assert atoms == before
    assert atoms.calc is None


def energy_range(timestep_fs: float) -> float:
    """Range of the total energy over 0.8 ps, meV per atom."""
    chosen = settings("nve", steps=int(800 / timestep_fs), timestep_fs=timestep_fs, stride=1)
    total = np.array([atoms.get_total_energy() / len(atoms) for _, atoms in iterate_md(copper(), Springs(), chosen)])
    return 1e3 * np.ptp(total)


def test_nve_conserves_energy_to_second_order_in_the_step():
    fine, coarse = energy_range(2.0), energy_range(8.0)
    assert fine < 0.2  # of 26 meV of thermal energy
    assert coarse == pytest.approx(16 * fine, rel=0.2)  # the negative twin: the error grows as dt²


def test_velocities_are_maxwell_boltzmann_without_net_momentum():
    temperatures = []
    for seed in range(200):
        first = next(iterate_md(molecule("CH3CH2OH"), Springs(), settings("nve", seed=seed)))[1]
        momenta = first.get_momenta()
        assert np.abs(momenta.sum(axis=0)).max() < 1e-12
        temperatures.append(2 * first.get_kinetic_energy() / (24 * 8.617333262e-5))
    # T of 24 degrees of freedom spreads by sqrt(2/24); the mean of 200 by 2 %: three standard errors
    assert np.mean(temperatures) == pytest.approx(300, rel=0.062)
    assert np.std(temperatures) / 300 == pytest.approx(np.sqrt(2 / 24), rel=0.25)
    own = molecule("H2O")
    own.set_momenta(np.ones((3, 3)))
    np.testing.assert_array_equal(next(iterate_md(own, Springs(), settings("nve")))[1].get_momenta(), np.ones((3, 3)))


def test_langevin_reaches_the_temperature():
    chosen = settings(steps=2500, timestep_fs=4.0, friction_per_fs=0.02, stride=10, temperature_K=500)
    temperatures = [atoms.get_temperature() for _, atoms in iterate_md(copper(), Springs(), chosen)][40:]
    # 24 degrees of freedom spread by 29 %; 210 frames, each about one relaxation time after the last: 2.5 %
    assert np.mean(temperatures) == pytest.approx(500, rel=0.08)
    assert np.std(temperatures) / 500 == pytest.approx(np.sqrt(2 / 24), rel=0.25)


def test_npt_lets_a_compressed_cell_expand_and_keeps_its_shape():
    atoms = copper()
    atoms.set_cell(atoms.cell * 0.97, scale_atoms=True)
    chosen = settings("npt", steps=300, timestep_fs=4.0, barostat_time_fs=100.0, stride=10)
    frames = [frame for _, frame in iterate_md(atoms, EMT(), chosen)]
    volumes = [frame.cell.volume for frame in frames]
    assert np.mean(volumes[-10:]) > 1.03 * volumes[0]
    np.testing.assert_allclose(frames[-1].cell.angles(), 90)
    np.testing.assert_allclose(np.ptp(frames[-1].cell.lengths() / atoms.cell.lengths()), 0, atol=1e-9)
    with pytest.raises(InputError, match="three periodic directions"):
        next(iterate_md(molecule("H2O"), EMT(), settings("npt")))


def test_velocities_in_the_file_are_the_derivative_of_positions(tmp_path):
    import h5py

    run_md(copper(), EMT(), settings("nve", stride=1, timestep_fs=0.5, steps=4), tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        particles = file["particles/all"]
        positions, velocities = particles["position/value"][()], particles["velocity/value"][()]
        slope = (positions[2:] - positions[:-2]) / (particles["position/time"][2] - particles["position/time"][0])
        np.testing.assert_allclose(velocities[1:-1], slope, atol=2e-6)  # dt² x'''/6
        masses = copper().get_masses()[:, None]
        force = masses * (velocities[2:] - velocities[:-2]) / 1.0 * ASE_TIME_FS**2
        stored = particles["force/value"]
        assert stored.attrs["unit"] == "kJ mol-1 Angstrom-1"
        np.testing.assert_allclose(stored[1:-1] * KJ_PER_MOL, force, atol=5e-3)


class Failing(EMT):
    """EMT whose forces become what `value` says after 30 evaluations."""

    name = "emt"

    def __init__(self, value: float):
        super().__init__()
        self.value, self.calls = value, 0

    def calculate(self, *args, **kwargs):
        """As EMT, with one wrong force component later on."""
        super().calculate(*args, **kwargs)
        self.calls += 1
        if self.calls > 30:
            self.results["forces"][3, 1] = self.value


@pytest.mark.parametrize(
    ("value", "message"), [(1e3, "a force is 1000 eV/Å, more than 200"), (float("nan"), "a force is nan eV/Å")]
)
@pytest.mark.parametrize("suffix", [".h5", ".xyz"])
def test_a_force_that_explodes_ends_the_run_with_a_readable_trajectory(tmp_path, value, message, suffix):
    result = run_md(copper(), Failing(value), settings(), tmp_path / f"a{suffix}")
    assert result.stopped is not None
    assert message in result.stopped
    frames = read_list(tmp_path / f"a{suffix}")
    assert len(frames) == result.n_frames >= 9
    assert all(np.isfinite(labels_of(atoms)["forces"]).all() for atoms in frames)
    with pytest.raises(RuntimeError, match="a force is"):
        list(iterate_md(copper(), Failing(value), settings()))


def test_a_temperature_that_explodes_ends_the_run(tmp_path):
    result = run_md(copper(), EMT(), settings("nve", temperature_K=3000, max_temperature_K=1000), tmp_path / "a.h5")
    assert result.stopped is not None
    assert "the temperature is" in result.stopped
    assert read_list(tmp_path / "a.h5")[-1].info["step"] == 0


class Known(EMT):
    """EMT that says which elements it knows, as EquimdCalculator does."""

    class potential:
        """The potential inside."""

        species = (29,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__delitem__(slice(None)), "the structure is empty"),
        (lambda a: a.positions.__setitem__((2, 1), np.nan), r"the position of atom 2 is \[.*nan.*finite"),
        (lambda a: a.positions.__setitem__(1, a.positions[0]), "atoms 0 and 1 are 0 Å apart"),
        (lambda a: a.positions.__setitem__(1, a.positions[0] + a.cell[2]), "atoms 0 and 1 are .* Å apart"),
        (lambda a: a.numbers.__setitem__(0, 79), "element Au is unknown to the potential; accepted: Cu"),
        (lambda a: a.set_cell([0, 0, 0]), "periodic along"),
    ],
)
def test_bad_structures_are_refused_in_one_line(tmp_path, change, message):
    atoms = copper()
    change(atoms)
    with pytest.raises(InputError, match=message) as refused:
        run_md(atoms, Known(), settings(), tmp_path / "a.h5")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_outputs_and_settings_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.xyz"
    run_md(copper(), EMT(), settings(steps=40), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"a\.xyz exists"):
        run_md(copper(), EMT(), settings(), path)
    with pytest.raises(InputError, match=r"seed was 3 and is 4; only steps may change"):
        run_md(copper(), EMT(), settings(seed=4), path, resume=True)
    with pytest.raises(InputError, match="holds other atoms"):
        run_md(molecule("H2O"), EMT(), settings(), path, resume=True)
    with pytest.raises(InputError, match="name was 'emt' and is 'lennardjones'"):
        run_md(copper(), LennardJones(), settings(), path, resume=True)
    with pytest.raises(InputError, match="does not exist"):
        run_md(copper(), EMT(), settings(), tmp_path / "no" / "a.h5")
    with pytest.raises(InputError, match="accepted suffixes"):
        run_md(copper(), EMT(), settings(), tmp_path / "a.dcd")
    assert path.read_bytes() == before
    path.with_name("a.xyz.state.json").write_text("{")
    with pytest.raises(InputError, match="is no checkpoint"):
        run_md(copper(), EMT(), settings(), path, resume=True)
    with pytest.raises(InputError, match="ensemble is 'nph'"):
        settings("nph")
    with pytest.raises(InputError, match="temperature_K is 0"):
        settings("nvt", temperature_K=0)


def test_a_full_disk_keeps_the_trajectory_whole(tmp_path, monkeypatch):
    import equimd.frames.transaction as transaction

    original, calls = transaction.np.savez, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(transaction.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        run_md(copper(), EMT(), settings(steps=100), tmp_path / "a.h5")
    monkeypatch.undo()
    assert len(read_list(tmp_path / "a.h5")) == 14
    assert not list(tmp_path.glob("*.tmp"))
    run_md(copper(), EMT(), settings(steps=100), tmp_path / "a.h5", resume=True)
    run_md(copper(), EMT(), settings(steps=100), tmp_path / "b.h5")
    np.testing.assert_array_equal(numbers(read_list(tmp_path / "a.h5")), numbers(read_list(tmp_path / "b.h5")))


def test_fixed_atoms_stay_and_their_forces_are_recorded():
    atoms = copper()
    atoms.set_constraint(FixAtoms([0]))
    frames = [frame for _, frame in iterate_md(atoms, EMT(), settings("nve"))]
    np.testing.assert_array_equal(frames[-1].positions[0], atoms.positions[0])
    assert np.abs(labels_of(frames[-1])["forces"][0]).max() > 1e-3


def test_progress_counts_to_the_last_step(tmp_path):
    seen = []
    run_md(copper(), EMT(), settings(), tmp_path / "a.h5", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60)
    assert seen == sorted(seen)


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_a_single_atom(ensemble):
    frames = [frame for _, frame in iterate_md(Atoms("H"), Springs(), settings(ensemble, timestep_fs=0.5))]
    assert len(frames) == 21
    assert np.isfinite(frames[-1].positions).all()
    assert frames[-1].positions.any() == (ensemble == "nvt")  # without a thermostat its centre of mass rests


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_a_run_comes_back_with_its_masses_and_constraints(tmp_path, ensemble):
    from ase.constraints import FixAtoms

    atoms = copper()
    atoms.set_masses([65.0] * len(atoms))
    atoms.set_constraint(FixAtoms([0, 3]))
    atoms.set_tags(range(len(atoms)))
    atoms.info["lossy"] = "of the file that it starts from"
    run_md(atoms, EMT(), settings(ensemble), tmp_path / "a.h5")
    last = read_list(tmp_path / "a.h5")[-1]
    assert last.get_masses().tolist() == [65.0] * len(atoms)
    assert last.constraints[0].index.tolist() == [0, 3]
    assert last.get_tags().tolist() == list(range(len(atoms)))
    assert "lossy" not in last.info
    np.testing.assert_array_equal(last.positions[[0, 3]], atoms.positions[[0, 3]])
    run_md(atoms, EMT(), settings(ensemble, steps=90), tmp_path / "a.h5", resume=True)  # the same system still
