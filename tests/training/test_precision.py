import pytest
import torch
from training_samples import TINY, labelled_graph

from equimd.errors import InputError
from equimd.models.checkpoint import build_potential
from equimd.models.transformer import TransformerSettings
from equimd.training import train
from equimd.training.objective import Objective
from equimd.training.precision import matmul_precision, precision_error
from equimd.training.recipe import make_recipe


def rounds_products() -> bool:
    """Whether torch takes bfloat16 where it may: on some processors it does not, although they could."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    with matmul_precision("bf16"):
        product = a @ b
    # float32 leaves 1e-5 in sums of 256 products, bfloat16 1e-1
    return bool((product - a.double() @ b.double()).abs().max() > 1e-3)


def test_the_error_is_that_of_the_products():
    settings = TransformerSettings(**{**TINY["transformer"], "d_model": 64, "d_feedforward": 64})
    torch.manual_seed(0)
    potential = build_potential(settings, (1, 6, 8), {1: 0.0, 6: 0.0, 8: 0.0})
    potential.kernel_backend = "reference"  # autograd: nothing is compiled for this size alone
    graph = labelled_graph(potential)
    none = precision_error(potential, graph, "float32")
    assert none.forces == none.gradient == 0.0
    error = precision_error(potential, graph, "bf16")
    if rounds_products():  # to eight bits
        assert 1e-5 < error.forces < 0.1
        assert 1e-5 < error.gradient < 0.1
    else:
        assert max(error.forces, error.gradient) < 1e-5
    exact = precision_error(potential.double(), graph, "bf16")
    assert exact.forces == exact.gradient == 0.0  # it is for float32 only


def test_the_setting_is_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), matmul_precision("tf32"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    for name, setting in (("tf32", "high"), ("bf16", "medium")):
        with matmul_precision(name):
            assert torch.get_float32_matmul_precision() == setting
    with matmul_precision("float32"):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("family", ["transformer", "equivariant"])
def test_a_training_reports_its_error(folder, values, family, capsys, monkeypatch):
    values |= {"model": TINY[family], "dtype": "float32", "precision": "bf16", "steps": 3}
    original, used = Objective.loss, []

    def loss(self, *arguments):
        used.append(torch.get_float32_matmul_precision())
        return original(self, *arguments)

    monkeypatch.setattr(Objective, "loss", loss)
    result = train(make_recipe(values, folder), folder / "run")
    assert used == ["medium"] * 3
    assert result.precision is not None
    assert result.precision.setting == "bf16"
    assert result.precision.start.gradient < 0.1
    assert result.precision.end.forces < 0.1
    assert capsys.readouterr().err.count("bf16 products change forces by") == 2
    assert torch.get_float32_matmul_precision() == "highest"


def test_reduced_precision_is_for_float32(values):
    with pytest.raises(InputError, match="precision tf32 is for dtype float32; dtype is float64"):
        make_recipe(values | {"precision": "tf32"})
