import math

import pytest
import torch
from torch import nn

from equimd.training.optim import (
    WeightAverage,
    gradient_norm,
    learning_rate_factor,
    make_optimizers,
    set_learning_rate,
)
from equimd.training.sections import OptimizerSection, ScheduleSection


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(3, 4))
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 1)

    def forward(self):
        return self.out(torch.tanh(self.hidden(self.embedding))).square().mean()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_stepped_once_and_the_loss_falls(name):
    torch.manual_seed(0)
    net = Net()
    optimizers = make_optimizers(net, OptimizerSection(name=name, lr=1e-2))
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    if name == "muon":
        muon = {id(p) for p in optimizers[1].param_groups[0]["params"]}
        assert muon == {id(net.hidden.weight)}  # neither the embedding nor the last layer
    first = float(net().detach())
    for _ in range(50):
        net.zero_grad()
        net().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert float(net().detach()) < 0.5 * first


def test_only_matrices_decay():
    net = Net()
    (optimizer,) = make_optimizers(net, OptimizerSection(weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(net.hidden.weight)] == 0.1
    assert decays[id(net.hidden.bias)] == 0.0


def test_schedule_warms_up_and_falls_to_its_final_value():
    section = ScheduleSection(warmup_steps=10, final=0.1)
    assert learning_rate_factor(section, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate_factor(section, 9, 0.0) == pytest.approx(1.0)
    assert learning_rate_factor(section, 500, 0.5) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_factor(section, 999, 1.0) == pytest.approx(0.1)
    optimizers = make_optimizers(Net(), OptimizerSection(name="muon", lr=1e-2, muon_lr=2e-2))
    assert set_learning_rate(optimizers, 0.5) == pytest.approx(5e-3)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(1e-2)


def test_average_of_constant_weights_is_the_weights_and_follows_slowly():
    net, average = Net(), Net()
    mean = WeightAverage(net, average, decay=0.9)
    for step in range(1, 400):
        mean.update(step)
    torch.testing.assert_close(average.embedding, net.embedding.detach(), rtol=1e-5, atol=1e-6)
    before = average.embedding.clone()
    with torch.no_grad():
        net.embedding += 1.0
    mean.update(400)
    torch.testing.assert_close(average.embedding, before + 0.1, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in average.parameters())


def test_the_gradient_is_clipped():
    net = Net()
    (1000 * net()).backward()
    parameters = list(net.parameters())
    before = float(gradient_norm(parameters, None))
    assert float(gradient_norm(parameters, 0.5)) == pytest.approx(before)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
    assert after == pytest.approx(0.5, rel=1e-4)
