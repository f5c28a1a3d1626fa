"""What TensorBoard and Weights & Biases are told, by stand-ins for them; a training needs neither."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from equimd.errors import InputError
from equimd.training import train
from equimd.training.recipe import make_recipe

LOGGING = {"tensorboard": True, "wandb": {"project": "springs", "mode": "offline"}}


class Service:
    """Both packages; ``fails`` names the call that raises."""

    def __init__(self, monkeypatch, fails=None):
        self.fails, self.calls = fails, []
        tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
        tensorboard.SummaryWriter = lambda folder, purge_step: self.called("SummaryWriter", purge_step) or self
        wandb.init = lambda **options: self.called("init", options) or self
        self.add_scalar = lambda name, value, step: self.called("add_scalar", (name, step))
        self.flush = self.close = lambda: None
        self.log = lambda values, step: self.called("log", (sorted(values), step))
        self.finish = lambda: self.called("finish")
        for module in (tensorboard, wandb):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def called(self, name, what=None):
        self.calls.append(SimpleNamespace(name=name, what=what))
        if name == self.fails:
            raise ConnectionError("no such server")

    def of(self, name):
        return [call.what for call in self.calls if call.name == name]


def test_both_get_every_validation_and_a_resume_continues(folder, values, monkeypatch):
    service = Service(monkeypatch)
    values |= {"logging": LOGGING, "schedule": {"kind": "constant"}}
    for steps in (4, 8):
        train(make_recipe({**values, "steps": steps}, folder), folder / "run", resume=steps > 4, progress=False)
    assert [step for _, step in service.of("log")] == [4, 8]
    names = service.of("log")[0][0]
    assert {"valid_force_mae_meV_per_A", "l_equiv", "device_hours"} <= set(names)
    assert "step" not in names
    assert {step for name, step in service.of("add_scalar") if name == "lr"} == {4, 8}
    assert service.of("SummaryWriter") == [1, 5]  # what a resume repeats is purged
    first, second = service.of("init")
    assert first["id"] == second["id"] == (folder / "run" / "wandb-id.txt").read_text().strip()
    assert (first["project"], first["mode"], first["resume"]) == ("springs", "offline", "allow")
    assert first["config"]["name"] == "tiny"
    assert len(service.of("finish")) == 2


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("SummaryWriter", "TensorBoardLogger is left out: no such server"),
        ("init", "WandbLogger is left out: no such server"),
        ("log", "WandbLogger is left out from here on: no such server"),
    ],
)
def test_a_service_that_fails_is_left_out(folder, values, monkeypatch, fails, said):
    service = Service(monkeypatch, fails)
    values |= {"logging": LOGGING, "steps": 8}
    with pytest.warns(UserWarning, match=said):
        assert train(make_recipe(values, folder), folder / "run", progress=False).steps == 8
    assert len(service.of(fails)) == 1
    assert service.of("log") if fails == "SummaryWriter" else service.of("add_scalar")  # the other goes on


@pytest.mark.parametrize(("key", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_leaves_no_folder(folder, values, monkeypatch, key, module):
    monkeypatch.setitem(sys.modules, module, None)
    recipe = make_recipe({**values, "logging": {key: LOGGING[key]}}, folder)
    with pytest.raises(InputError, match=rf"logging.{key} needs the package {key}, .*pip install"):
        train(recipe, folder / "run", progress=False)
    assert not (folder / "run").exists()
