"""The file that a resume starts from: whole, damaged, of an earlier version, or of another network."""

import json

import pytest
import torch
from safetensors.torch import save_file

from equimd.errors import InputError
from equimd.models.container import read_tensors
from equimd.training.state import FORMAT, STATE_FILE, Progress, read_state, write_state


@pytest.fixture
def parts():
    """A module that has been trained for one step, and its optimiser."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"weights": module}, [optimizer]


def rewrite(file, change):
    """The file with changed tensors, as equimd wrote it before there were hashes."""
    header, tensors = read_tensors(file, FORMAT, finite=False)
    header.pop("format_version")
    save_file(change(tensors), file, {"format": FORMAT, "header": json.dumps(header)})


def test_a_state_is_read_back_and_damage_is_found(tmp_path, parts):
    write_state(tmp_path, Progress(step=7, best=float("nan")), {"seed": 1}, *parts)
    file = tmp_path / STATE_FILE
    assert read_state(tmp_path, {"seed": 1}, *parts).step == 7
    content = file.read_bytes()
    for at in (20, content.index(b"progress") + 20, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(InputError, match=STATE_FILE) as caught:
            read_state(tmp_path, {"seed": 1}, *parts)
        assert "\n" not in str(caught.value)


def test_a_state_without_a_hash_is_read(tmp_path, parts):
    write_state(tmp_path, Progress(step=7), {"seed": 1}, *parts)
    rewrite(tmp_path / STATE_FILE, lambda tensors: tensors)
    assert read_state(tmp_path, {"seed": 1}, *parts).step == 7


def test_tensors_that_do_not_fit_are_refused(tmp_path, parts):
    for name in ("weights/weight", "optimizer0/0/exp_avg"):
        write_state(tmp_path, Progress(), {"seed": 1}, *parts)
        rewrite(tmp_path / STATE_FILE, lambda tensors, name=name: tensors | {name: torch.ones(5)})
        with pytest.raises(InputError, match="does not fit this recipe") as caught:
            read_state(tmp_path, {"seed": 1}, *parts)
        assert "\n" not in str(caught.value)
