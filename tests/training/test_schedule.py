import csv

import pytest

from equimd.errors import InputError
from equimd.training import train
from equimd.training.distributed import PeerLostError
from equimd.training.optim import make_optimizers
from equimd.training.recipe import make_recipe
from equimd.training.reporting import MetricsFile
from equimd.training.schedule import after_validation, learning_rate_factor, set_learning_rate
from equimd.training.sections import OptimizerSection, ScheduleSection
from equimd.training.state import Progress


def factors(section, progress=(0.0, 0.25, 0.5, 0.75, 1.0), step=10**6):
    return [learning_rate_factor(section, step, t) for t in progress]


def test_the_kinds_follow_their_formulas():
    def section(kind, **more):
        return ScheduleSection(kind=kind, warmup_steps=10, final=0.2, **more)

    assert factors(section("cosine")) == pytest.approx([1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.317157, 0.2])
    assert factors(section("linear")) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert factors(section("constant")) == [1.0] * 5
    assert factors(section("wsd", decay_fraction=0.5)) == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.2])
    assert factors(section("plateau")) == [1.0] * 5
    assert learning_rate_factor(section("plateau"), 10**6, 0.5, 0.7) == pytest.approx(0.7)
    assert learning_rate_factor(section("plateau"), 10**6, 0.5, 0.1) == pytest.approx(0.2)  # final is the least


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "plateau"])
def test_every_kind_warms_up(kind):
    section = ScheduleSection(kind=kind, warmup_steps=10)
    assert [learning_rate_factor(section, step, 0.0) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate_factor(ScheduleSection(kind=kind, warmup_steps=0), 0, 0.0) == 1.0


def test_a_plateau_is_counted_from_the_last_improvement_or_reduction():
    section, progress = ScheduleSection(kind="plateau", patience=2, factor=0.1), Progress()
    seen = []
    for improved in (True, False, False, False, True, False, False):
        after_validation(section, progress, improved)
        seen.append(progress.reduced)
    assert seen == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.01])
    other = Progress()
    for _ in range(9):
        after_validation(ScheduleSection(kind="constant"), other, False)
    assert other.reduced == 1.0


def test_learning_rates_are_set_by_group():
    import torch

    net = torch.nn.Linear(3, 3)
    optimizers = make_optimizers(net, OptimizerSection(name="muon", lr=1e-2, muon_lr=2e-2))
    assert set_learning_rate(optimizers, 0.5) == pytest.approx(5e-3)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"patience": 3}, "patience is 3, which is for kind 'plateau'; kind is 'cosine'"),
        ({"kind": "linear", "factor": 0.1}, "factor is 0.1, which is for kind 'plateau'"),
        ({"kind": "plateau", "decay_fraction": 0.5}, "decay_fraction is 0.5, which is for kind 'wsd'"),
        ({"kind": "step"}, "schedule.kind is 'step'"),
        ({"kind": "plateau", "factor": 1.5}, "schedule.factor is 1.5"),
    ],
)
def test_settings_of_another_kind_are_refused(values, section, said):
    with pytest.raises(InputError) as caught:
        make_recipe({**values, "schedule": section})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stopping_before_the_first_reduction_is_refused(values):
    plateau = {"schedule": {"kind": "plateau", "patience": 4}}
    with pytest.raises(InputError, match=r"early_stopping.patience is 4, schedule.patience 4: it would stop"):
        make_recipe({**values, **plateau, "early_stopping": {"patience": 4}})
    make_recipe({**values, **plateau, "early_stopping": {"patience": 5}})
    make_recipe({**values, "early_stopping": {"patience": 4}})


def learning_rates(run):
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


def test_a_plateau_reduces_the_rate_of_a_training_and_resumes_bit_for_bit(folder, values, monkeypatch):
    from test_loop import Killed, assert_same_run

    from equimd.training import loop

    values |= {"steps": 32, "checkpoint": {"steps": 3, "minutes": None}, "optimizer": {"lr": 1e-300}}
    values["schedule"] = {"kind": "plateau", "patience": 2, "warmup_steps": 0, "final": 0.2}
    recipe = make_recipe(values, folder)
    train(recipe, folder / "whole", progress=False)
    # The weights do not move: the first validation of eight is the best. Rates are those of the steps before.
    expected = [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2]
    assert learning_rates(folder / "whole") == pytest.approx([1e-300 * f for f in expected], rel=1e-6)
    count, original = 0, loop._Training.step

    def dies(self, *arguments):
        nonlocal count
        count += 1
        if count == 23:  # between reductions, with one validation counted
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", dies)
        with pytest.raises(Killed):
            train(recipe, folder / "killed", progress=False)
    train(recipe, folder / "killed", resume=True, progress=False)
    assert_same_run(folder / "killed", folder / "whole")


def test_a_validation_that_is_not_written_down_does_not_count(folder, values, monkeypatch):
    from test_loop import assert_same_run

    values |= {"steps": 16, "optimizer": {"lr": 1e-300}, "schedule": {"kind": "plateau", "patience": 1}}
    recipe, original = make_recipe(values, folder), MetricsFile.append
    train(recipe, folder / "whole", progress=False)

    def lost(self, row):
        if row["step"] == 8:
            raise PeerLostError("another process is gone")
        original(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "append", lost)
        with pytest.raises(PeerLostError):
            train(recipe, folder / "run", progress=False)
    train(recipe, folder / "run", resume=True, progress=False)
    assert_same_run(folder / "run", folder / "whole")


def test_a_training_without_decay_may_be_extended(folder, values):
    from test_loop import assert_same_run

    values["schedule"] = {"kind": "constant", "warmup_steps": 2}
    for steps in (4, 12):  # after an epoch, and after three
        train(make_recipe({**values, "steps": steps}, folder), folder / "extended", resume=steps > 4, progress=False)
    result = train(make_recipe({**values, "steps": 12}, folder), folder / "whole", progress=False)
    assert result.steps == 12
    assert_same_run(folder / "extended", folder / "whole")
    again = train(make_recipe({**values, "steps": 12}, folder), folder / "whole", resume=True, progress=False)
    assert again.steps == 12
    values["schedule"] = {"kind": "linear"}
    train(make_recipe({**values, "steps": 4}, folder), folder / "linear", progress=False)
    with pytest.raises(InputError, match=r"recipe.steps was 4 and is now 12"):
        train(make_recipe({**values, "steps": 12}, folder), folder / "linear", resume=True, progress=False)


@pytest.mark.parametrize(
    "section",
    [
        {"loss": {"stages": [{"start": 0.5, "energy": 3.0}]}},
        {"loss": {"last": {"energy": 3.0}}},
        {"denoising": {"final": 0.5}},
        {"pretraining": {}},
    ],
)
def test_what_depends_on_the_length_may_not_be_extended(folder, values, section):
    values |= {"schedule": {"kind": "constant"}, "validation": {"symmetry_frames": 0}, **section}
    train(make_recipe({**values, "steps": 2}, folder), folder / "run", progress=False)
    with pytest.raises(InputError, match=r"recipe.steps was 2 and is now 4"):
        train(make_recipe({**values, "steps": 4}, folder), folder / "run", resume=True, progress=False)


def test_even_denoising_may_be_extended(folder, values):
    values |= {"schedule": {"kind": "constant"}, "denoising": {"final": 1.0}}
    for steps in (2, 4):
        recipe = make_recipe({**values, "steps": steps}, folder)
        assert train(recipe, folder / "run", resume=steps > 2, progress=False).steps == steps


def test_fitted_energies_may_differ_in_the_last_digits_at_a_resume(folder, values, monkeypatch):
    from equimd.training import dataset

    values |= {"steps": 2, "data": {**values["data"], "isolated_atom_energies": None}}
    recipe, original = make_recipe(values, folder), dataset.isolated_atom_energies
    train(recipe, folder / "run", progress=False)

    def elsewhere(*arguments):
        found = original(*arguments)
        return found.model_copy(update={"energies": {z: e * (1 + 1e-15) for z, e in found.energies.items()}})

    monkeypatch.setattr(dataset, "isolated_atom_energies", elsewhere)
    assert train(recipe, folder / "run", resume=True, progress=False).steps == 2
    values["data"]["isolated_atom_energies"] = {"H": -10.0, "C": -48.0, "O": -102.0}
    with pytest.raises(InputError, match=r"recipe.data.isolated_atom_energies was None and is now"):
        train(make_recipe(values, folder), folder / "run", resume=True, progress=False)


def test_a_training_that_is_longer_than_it_should_be_ends(folder, values, monkeypatch):
    from test_loop import Killed

    from equimd.training import loop

    values |= {"schedule": {"kind": "constant", "warmup_steps": 2}, "steps": None}
    values["checkpoint"] = {"steps": 1, "minutes": None}
    original = loop._Training.step

    def dies(self, *arguments):
        if self.progress.step == 14:  # in the fourth of epochs of 4 steps
            raise Killed
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "step", dies)
        with pytest.raises(Killed):
            train(make_recipe({**values, "epochs": 5}, folder), folder / "run", progress=False)
    result = train(make_recipe({**values, "epochs": 2}, folder), folder / "run", resume=True, progress=False)
    assert (result.steps, result.stopped) == (14, "finished")


def test_the_end_of_an_extended_training_by_epochs(folder, values):
    values["schedule"] = {"kind": "wsd", "warmup_steps": 2}
    for epochs in (2, 3):
        recipe = make_recipe({**values, "steps": None, "epochs": epochs}, folder)
        for _ in range(2):  # the second resume has nothing to do
            result = train(recipe, folder / "run", resume=(folder / "run").exists(), progress=False)
            assert (result.steps, result.epochs, result.stopped) == (4 * epochs, epochs, "finished")
