"""Threads of kernels and of torch, which must not get in each other's way."""

import threading

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


def test_two_threads_do_not_disturb_each_other(set_threads):
    set_threads(3)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        torch.set_num_threads(3)
        with torch_on_one_thread():
            first_in.set()
            second_in.wait(10)
        seen["first"] = torch.get_num_threads()
        first_out.set()

    def second():
        torch.set_num_threads(3)
        first_in.wait(10)
        with torch_on_one_thread() as n:
            second_in.set()
            first_out.wait(10)
            seen["inside"] = n, torch.get_num_threads()
        seen["second"] = torch.get_num_threads()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": 3, "inside": (3, 1), "second": 3}


def test_an_interrupt_is_not_lost(monkeypatch):
    from equimd.kernels import threads

    waits, right = [], threads.wait

    def interrupted_once(futures):
        waits.append(futures)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return right(futures)

    monkeypatch.setattr(threads, "wait", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        run_ranges(lambda low, high: None, (), [0, 1, 2])
    assert len(waits) == 2
