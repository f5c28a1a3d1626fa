"""Threads of kernels and of torch, which must not get in each other's way."""

import pytest
import torch

from equimd.kernels.threads import get_num_threads, run_ranges, torch_on_one_thread


def test_ranges_are_run_once_each(set_threads):
    seen = []
    run_ranges(lambda low, high: seen.append((low, high)), (), [0, 3, 5, 9])
    assert sorted(seen) == [(0, 3), (3, 5), (5, 9)]


def test_an_error_of_any_range_is_raised():
    def fail(low, high):
        if low == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        run_ranges(fail, (), [0, 3, 5])


def test_torch_is_kept_on_one_thread_and_set_back(set_threads):
    set_threads(3)
    with torch_on_one_thread() as outer:
        assert (outer, torch.get_num_threads(), get_num_threads()) == (3, 1, 3)
        with pytest.raises(ValueError, match="3 outside"):
            _fail_inside()
        assert (torch.get_num_threads(), get_num_threads()) == (1, 3)
    assert (torch.get_num_threads(), get_num_threads()) == (3, 3)


def _fail_inside():
    with torch_on_one_thread() as outer:
        raise ValueError(f"{outer} outside")
