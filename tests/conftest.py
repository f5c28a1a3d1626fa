"""Puts this folder on the path, so that tests share ``toys``, and lets triton run on the CPU where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # triton looks when it is imported, which torch may do at any time; it then runs kernels number by number.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
