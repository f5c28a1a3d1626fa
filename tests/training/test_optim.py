import copy
import math

import pytest
import torch
from torch import nn
from training_samples import TINY

from equimd.errors import InputError
from equimd.models.checkpoint import build_potential
from equimd.models.equivariant import EquivariantSettings
from equimd.models.transformer import TransformerSettings
from equimd.training.muon import Muon, orthogonalize
from equimd.training.optim import WeightAverage, gradient_norm, is_hidden_matrix, make_optimizers, zero_gradients
from equimd.training.recipe import make_recipe
from equimd.training.sections import EMASection, OptimizerSection


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
        zero_gradients(net.parameters())
        net().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert float(net().detach()) < 0.5 * first


def test_only_matrices_decay():
    net = Net()
    (optimizer,) = make_optimizers(net, OptimizerSection(name="adamw", weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(net.hidden.weight)] == 0.1
    assert decays[id(net.hidden.bias)] == 0.0
    assert decays[id(net.embedding)] == 0.0


def hidden_matrices(settings):
    potential = build_potential(settings, (1, 8), {1: 0.0, 8: 0.0})
    return {name for name, p in potential.named_parameters() if is_hidden_matrix(name, p)}


def test_muon_takes_what_lies_between_hidden_features():
    tiny = {name: value for name, value in TINY["equivariant"].items() if name != "n_layers"}
    assert hidden_matrices(EquivariantSettings(**tiny, n_layers=1, rms_norm=True)) == {
        "layers.0.up.weights.0",
        "layers.0.radial.hidden.0.weight",
        "layers.0.radial.hidden.1.weight",
        "layers.0.radial.out.weight",
        "layers.0.mix.weights.0",
        "readout.0.weight",
    }
    linear = {f"transformers.0.0.{name}.weight" for name in ("qkv", "out", "up", "down")}
    assert hidden_matrices(TransformerSettings(**TINY["transformer"], direct_forces=True)) == linear


# --- Muon -------------------------------------------------------------------------------------------------------------

SHAPES = ((5, 7), (7, 5), (4, 4), (5, 7), (3, 40))


def twins(optimizer, other, steps=4):
    """The parameters that two optimisers arrive at from the same ones by the same gradients."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    both = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    made = [make(parameters) for make, parameters in zip((optimizer, other), both, strict=True)]
    for _ in range(steps):
        for p, q in zip(*both, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for one in made:
            one.step()
    return both


def ours(parameters):
    return Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.3)


def test_muon_is_that_of_torch(monkeypatch):
    muon = pytest.importorskip("torch.optim._muon")  # torch 2.9 and later

    def theirs(parameters, momentum=0.9):
        return muon.Muon(
            parameters, lr=0.02, momentum=momentum, weight_decay=0.3, adjust_lr_fn="match_rms_adamw", eps=1e-7
        )

    original = torch.Tensor.bfloat16
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # in the same precision
    for p, q in zip(*twins(ours, theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    p, q = (parameters[0] for parameters in twins(ours, lambda parameters: theirs(parameters, 0.8)))
    assert (p - q).abs().max() > 1e-4  # the comparison would notice another momentum
    monkeypatch.setattr(torch.Tensor, "bfloat16", original)
    for p, q in zip(*twins(ours, theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # of steps of 0.02 in bfloat16


def test_singular_values_become_about_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(6, 8, 20, dtype=torch.float64)))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(1, 2, 2)), torch.zeros(1, 2, 2))  # not NaN


@pytest.mark.parametrize(("dim", "n"), [(0, 3), (1, 2)])
def test_matrices_side_by_side_are_stepped_as_if_they_were_apart(dim, n):
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
    apart = [nn.Parameter(part.clone()) for part in whole.detach().chunk(n, dim)]
    for blocks, same in (({whole: (dim, n)}, True), ({}, False)):
        optimizers = [Muon([whole], lr=0.1, blocks=blocks), Muon(apart, lr=0.1)]
        for _ in range(3):
            whole.grad = torch.randn_like(whole)
            for part, gradient in zip(apart, whole.grad.chunk(n, dim), strict=True):
                part.grad = gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.allclose(whole, torch.cat(apart, dim), rtol=1e-12) == same


@pytest.mark.parametrize("family", ["equivariant", "transformer"])
def test_fused_matrices_are_chunks_of_hidden_ones(family):
    more = {"d_atom_feedforward": 4} if family == "transformer" else {"parity": True}
    settings = {"equivariant": EquivariantSettings, "transformer": TransformerSettings}[family]
    potential = build_potential(settings(**TINY[family] | more), (1, 8), {1: 0.0, 8: 0.0})
    parameters, fused = dict(potential.named_parameters()), potential.fused_matrices()
    assert fused
    for name, (dim, n) in fused.items():
        assert is_hidden_matrix(name, parameters[name])
        assert parameters[name].shape[dim] % n == 0
    if family == "equivariant":
        (first, *_), c = potential.interactions, 4
        assert fused["layers.0.mix.weights.0"] == (1, first.mix.weights[0].shape[1] // c)
        assert fused["layers.0.radial.out.weight"] == (0, first.radial.out.weight.shape[0] // c)
    else:
        names = {name.split(".")[-2]: n for name, (_, n) in fused.items()}
        assert names == {"qkv": 3, "up": 2, "atom_up": 2}
    (_, muon) = make_optimizers(potential, OptimizerSection(name="muon"))
    assert set(muon._blocks) == {parameters[name] for name in fused}
    (_, muon) = make_optimizers(potential, OptimizerSection(name="muon", muon_split=False))
    assert not muon._blocks


def test_muon_leaves_what_has_no_gradient_alone():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    parameters[1].grad = torch.randn(3, 4)
    optimizer.step()
    assert torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[1], before[1])


def test_settings_of_muon_without_muon_are_refused(values):
    with pytest.raises(InputError, match=r"muon_lr is 0.1, which is for name 'muon'; name is 'adamw'"):
        make_recipe({**values, "optimizer": {"name": "adamw", "muon_lr": 0.1}})
    make_recipe({**values, "optimizer": {"name": "muon", "muon_lr": 0.1, "muon_momentum": 0.9}})


# --- average ----------------------------------------------------------------------------------------------------------


def test_average_of_constant_weights_is_the_weights_and_follows_slowly():
    net, average = Net(), Net()
    mean = WeightAverage(net, average, EMASection(decay=0.9))
    for step in range(1, 400):
        mean.update(step)
    torch.testing.assert_close(average.embedding, net.embedding.detach(), rtol=1e-5, atol=1e-6)
    before = average.embedding.clone()
    with torch.no_grad():
        net.embedding += 1.0
    mean.update(400)
    torch.testing.assert_close(average.embedding, before + 0.1, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in average.parameters())


def test_without_decay_the_average_is_the_last_weights():
    net, average = Net(), Net()
    mean = WeightAverage(net, average, EMASection(decay=0.0))
    mean.update(500)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), average.parameters(), strict=True))


@pytest.mark.parametrize("steps", [100, 3000])
def test_an_average_by_fraction_has_an_age_in_proportion(steps):
    net = nn.Linear(1, 1).double()
    average = copy.deepcopy(net)
    mean = WeightAverage(net, average, EMASection(fraction=0.1))
    for step in range(1, steps + 1):
        nn.init.constant_(net.weight, float(step))  # so that the average of weights is that of steps
        mean.update(step)
    age = steps - float(average.weight)
    assert age / steps == pytest.approx(0.1, abs=1 / steps)  # steps are whole numbers


def test_the_gradient_is_clipped():
    net = Net()
    (1000 * net()).backward()
    parameters = list(net.parameters())
    before = gradient_norm(parameters, None)
    assert before == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)))
    assert gradient_norm(parameters, 2 * before) == pytest.approx(before)
    assert gradient_norm(parameters, 0.5) == pytest.approx(before)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
    assert after == pytest.approx(0.5, rel=1e-4)
