"""A run goes on only from the structure that began it, loses no frame, and is alone with its file."""

import json

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixCartesian
from test_run import Failing, Interrupted, Killed, Springs, copper, numbers, settings

from equimd.errors import InputError
from equimd.frames import read_list, write_frames
from equimd.md import CalculatorError, UnstableStart, run_md
from equimd.units import KB_EV_PER_K


def start() -> Atoms:
    """Copper with everything that decides a run: masses, momenta, a constraint, charges, a charge."""
    atoms = copper()
    atoms.set_masses([63.0, *atoms.get_masses()[1:]])
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    atoms.set_constraint(FixAtoms([0]))
    atoms.set_initial_charges([0.5] + [0.0] * 7)
    atoms.info = {"charge": 1, "name": "what it is called decides nothing"}
    return atoms


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 60 steps with its last checkpoint at 40, and the bytes of both files."""
    path = tmp_path_factory.mktemp("finished") / "a.h5"
    run_md(start(), EMT(), settings(checkpoint_every=40), path)
    return path


@pytest.fixture
def copied(finished, tmp_path):
    for file in finished.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / finished.name


def change(name):
    atoms = start()
    changes = {
        "pbc": lambda: atoms.set_pbc([True, True, False]),
        "cell": lambda: atoms.set_cell(atoms.cell * 1.001),
        "positions": lambda: atoms.positions.__setitem__((5, 2), 9.0),
        "momenta": lambda: atoms.set_momenta(np.zeros((8, 3))),
        "masses": lambda: atoms.set_masses("defaults"),
        "no constraint": lambda: atoms.set_constraint(),
        "another constraint": lambda: atoms.set_constraint(FixAtoms([0, 3])),
        "another direction": lambda: atoms.set_constraint(FixCartesian([0], (True, False, False))),
        "charges": lambda: atoms.set_initial_charges([0.25] + [0.0] * 7),
        "moments": lambda: atoms.set_initial_magnetic_moments([1.0] + [0.0] * 7),
        "charge": lambda: atoms.info.update(charge=0),
        "spin": lambda: atoms.info.update(total_spin=3),
    }
    changes[name]()
    return atoms


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pbc", r"pbc changed: \[True, True, True\] before and \[True, True, False\] now"),
        ("cell", r"cell changed: \[\[7\.22.* before and \[\[7\.227"),
        ("positions", r"positions changed: .* before and .*9\.0\] now, of atom 5 \(Cu\)"),
        ("momenta", "momenta changed: .*of atom 0"),
        ("masses", r"masses changed: 63\.0 before and 63\.546 now, of atom 0"),
        ("no constraint", "constraints changed: .*atom 0 fixed along xyz.* before and none now"),
        ("another constraint", "constraints changed: none before and .*atom 3 fixed along xyz"),
        ("another direction", "constraints changed: .*along xyz.* before and .*along x'"),
        ("charges", r"initial charges changed: 0\.5 before and 0\.25 now"),
        ("moments", r"initial magnetic moments changed: 0\.0 before and 1\.0 now"),
        ("charge", "charge and spin changed: {'charge': 1} before and {'charge': 0} now"),
        ("spin", "charge and spin changed: .*total_spin"),
    ],
)
def test_another_start_structure_is_refused_by_name(copied, name, says):
    before = {file: file.read_bytes() for file in copied.parent.iterdir()}
    with pytest.raises(InputError, match=says) as refused:
        run_md(change(name), EMT(), settings(steps=90, checkpoint_every=40), copied, resume=True)
    assert "\n" not in str(refused.value)
    assert {file: file.read_bytes() for file in copied.parent.iterdir()} == before


def test_the_same_structure_from_a_file_goes_on(copied, tmp_path):
    """The negative twin: what a file of structures rounds away is no other start, nor is what is not read of it."""
    atoms = start()
    atoms.positions += 4e-9
    atoms.info["name"] = "another"
    result = run_md(atoms, EMT(), settings(steps=90, checkpoint_every=40), copied, resume=True)
    run_md(start(), EMT(), settings(steps=90, checkpoint_every=40), tmp_path / "whole.h5")
    assert result.steps == 90
    np.testing.assert_array_equal(numbers(read_list(copied)), numbers(read_list(tmp_path / "whole.h5")))


def test_a_state_of_an_earlier_version_goes_on_with_a_word(copied):
    path = copied.with_name("a.h5.state.json")
    state = json.loads(path.read_text())
    for new in ("start", "reached", "averages"):
        del state[new]
    path.write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="earlier version.* only elements are compared"):
        result = run_md(start(), EMT(), settings(checkpoint_every=40), copied, resume=True)
    assert (result.n_frames, result.volume_A3) == (21, None)
    assert result.mean_temperature_K > 0


def test_fewer_steps_than_done_delete_nothing(copied):
    before = copied.read_bytes()
    for steps in (59, 45, 20, 0):  # 45 is beyond the last checkpoint
        with pytest.raises(InputError, match=f"steps is {steps}, and the run has done 60"):
            run_md(start(), EMT(), settings(steps=steps, stride=3, checkpoint_every=40), copied, resume=True)
    assert copied.read_bytes() == before


def test_frames_beyond_the_checkpoint_count_without_a_note_of_them(copied):
    path = copied.with_name("a.h5.state.json")
    state = json.loads(path.read_text())
    del state["reached"]
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match="steps is 45, and the run has done 60"):
        run_md(start(), EMT(), settings(steps=45, checkpoint_every=40), copied, resume=True)


def test_an_interrupted_run_is_not_cut_short(tmp_path):
    with pytest.raises(Killed):
        run_md(copper(), Interrupted(58), settings(), tmp_path / "a.xyz")
    held = len(read_list(tmp_path / "a.xyz"))
    with pytest.raises(InputError, match="steps is 50, and the run has done 5"):
        run_md(copper(), EMT(), settings(steps=50), tmp_path / "a.xyz", resume=True)
    assert len(read_list(tmp_path / "a.xyz")) == held > 17


class Untouched(EMT):
    """EMT that must not be asked."""

    name = "emt"

    def calculate(self, *args, **kwargs):
        """Fail."""
        raise AssertionError("a finished run computes nothing")


def test_a_finished_run_is_left_as_it_is(copied):
    before = copied.read_bytes()
    result = run_md(start(), Untouched(), settings(checkpoint_every=40), copied, resume=True)
    assert (result.steps, result.n_frames, result.stopped) == (60, 21, None)
    assert result.temperature_K.value == pytest.approx(result.mean_temperature_K)
    assert copied.read_bytes() == before


def test_means_of_a_resumed_run_are_those_of_the_whole(tmp_path):
    whole = run_md(copper(), EMT(), settings("npt"), tmp_path / "whole.h5")
    with pytest.raises(Killed):
        run_md(copper(), Interrupted(48), settings("npt"), tmp_path / "cut.h5")
    cut = run_md(copper(), EMT(), settings("npt"), tmp_path / "cut.h5", resume=True)
    for name in ("mean_temperature_K", "temperature_K", "volume_A3", "density_g_cm3", "pressure_bar"):
        assert getattr(cut, name) == getattr(whole, name) is not None


@pytest.mark.skipif("sys.platform == 'win32'", reason="there are no such locks")
def test_two_runs_into_one_file_are_refused(tmp_path):
    path = tmp_path / "a.h5"

    def second(done, total):
        for resume in (False, True):
            with pytest.raises(InputError, match=r"another run is writing .*a\.h5"):
                run_md(copper(), EMT(), settings(), path, resume=resume)

    run_md(copper(), EMT(), settings(steps=20), path, progress=second)
    assert len(read_list(path)) == 7
    assert {file.name for file in tmp_path.iterdir()} == {"a.h5", "a.h5.state.json"}  # and no lock stays
    run_md(copper(), EMT(), settings(), path, resume=True)


class Broken(EMT):
    """EMT that raises at its n-th evaluation."""

    name = "emt"

    def __init__(self, calls: int):
        super().__init__()
        self.left = calls

    def calculate(self, *args, **kwargs):
        """As EMT, until the calls are used up."""
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError("the cycle does not converge")
        super().calculate(*args, **kwargs)


def test_a_calculator_that_raises_is_named_with_its_step_and_the_run_goes_on(tmp_path):
    run_md(copper(), EMT(), settings(), tmp_path / "whole.h5")
    with pytest.raises(CalculatorError, match="step 4[0-9]: ArithmeticError: the cycle") as failed:
        run_md(copper(), Broken(48), settings(), tmp_path / "a.h5")
    assert isinstance(failed.value.__cause__, ArithmeticError)
    assert len(read_list(tmp_path / "a.h5")) == failed.value.step // 3 + 1
    run_md(copper(), EMT(), settings(), tmp_path / "a.h5", resume=True)
    np.testing.assert_array_equal(numbers(read_list(tmp_path / "a.h5")), numbers(read_list(tmp_path / "whole.h5")))


@pytest.mark.parametrize(("value", "limit", "says"), [(1e3, 200.0, "1000 eV"), (np.nan, 200.0, "nan"), (1.0, 1e-3, "")])
def test_a_start_beyond_the_largest_force_is_refused_before_anything_is_written(tmp_path, value, limit, says):
    calculator = Failing(value)
    calculator.calls = 99  # it fails at once
    with pytest.raises(UnstableStart, match=rf"the force on atom \d \(Cu\) of the start structure is {says}.* at most"):
        run_md(copper(), calculator, settings(max_force=limit), tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".h5", ".xyz"])
def test_isotopes_and_constraints_go_through_file_run_and_resume(tmp_path, suffix):
    water = Atoms("OH2", positions=[[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    water.set_masses([15.999, 2.014, 2.014])
    water.set_constraint(FixAtoms([0]))
    write_frames(tmp_path / f"start{suffix}", [water])
    given, path, chosen = read_list(tmp_path / f"start{suffix}")[0], tmp_path / f"a{suffix}", {"timestep_fs": 0.5}
    result = run_md(given, Springs(), settings(**chosen), path)
    frames = read_list(path)
    for frame in frames:
        np.testing.assert_array_equal(frame.get_masses(), [15.999, 2.014, 2.014])
        np.testing.assert_array_equal(frame.positions[0], water.positions[0])
        assert [list(constraint.index) for constraint in frame.constraints] == [[0]]
    by_hand = [2 * frame.get_kinetic_energy() / (6 * KB_EV_PER_K) for frame in frames]
    assert result.mean_temperature_K == pytest.approx(np.mean(by_hand), rel=1e-4)  # 8 decimals in a text file
    light = given.copy()
    light.set_masses("defaults")
    with pytest.raises(InputError, match=r"masses changed: 2\.014 before and 1\.008 now, of atom 1 \(H\)"):
        run_md(light, Springs(), settings(**chosen, steps=90), path, resume=True)
    assert run_md(given, Springs(), settings(**chosen, steps=90), path, resume=True).steps == 90
    again = run_md(frames[-1], Springs(), settings(**chosen, steps=3), tmp_path / f"b{suffix}")  # from its last frame
    assert again.stopped is None
    np.testing.assert_allclose(read_list(tmp_path / f"b{suffix}")[0].get_momenta(), frames[-1].get_momenta(), atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("masses", np.nan, "mass of atom 2 is nan u"),
        ("masses", 0.0, "mass of atom 2 is 0 u"),
        ("masses", -1.0, "is -1 u"),
    ]
    + [("momenta", np.nan, r"momentum of atom 2 is \[nan")],
)
def test_nothing_moves_with_such_masses_or_momenta(tmp_path, name, value, says):
    atoms = copper()
    atoms.set_momenta(np.ones((8, 3)))
    atoms.set_masses(atoms.get_masses())
    atoms.arrays[name][2] = value
    with pytest.raises(InputError, match=says):
        run_md(atoms, EMT(), settings(), tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())
