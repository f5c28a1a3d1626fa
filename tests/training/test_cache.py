"""The cache of graphs: used again, never half written, never stale, and no burden to memory or to other processes."""

import errno
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from training_samples import E0, spring_frames

from equimd.errors import FailedError, InputError
from equimd.frames import Frames, read_frames, write_frames
from equimd.frames import arrays as arrays_module
from equimd.frames.packing import Packer
from equimd.training import cache
from equimd.training.cache import Request, file_sha256, frame_arrays, graphs_folder
from equimd.training.data import FrameSet, build_frame_set, subset
from equimd.training.statistics import statistics

ENERGIES = {1: E0["H"], 6: E0["C"], 8: E0["O"]}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache of its own, into which everything goes, however small."""
    monkeypatch.setattr(cache, "graphs_folder", lambda: tmp_path / "cache" / "graphs")
    monkeypatch.setattr(arrays_module, "IN_MEMORY", 0)
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def request_(tmp_path):
    write_frames(tmp_path / "a.xyz", spring_frames(12, 0))
    return Request((tmp_path / "a.xyz",), None, None, 3.0)


@pytest.fixture
def builds(monkeypatch):
    """Names of the files that were read frame by frame."""
    seen = []
    original = Packer.add_file

    def counted(self, frames, name, n_frames=None):
        seen.append(Path(name).name)
        return original(self, frames, name, n_frames)

    monkeypatch.setattr(Packer, "add_file", counted)
    return seen


def assert_equal_sets(a: FrameSet, b: FrameSet) -> None:
    which = torch.arange(len(a)).flip(0)
    one, other = a.batch(which), b.batch(which)
    for key in ("positions", "atomic_numbers", "edge_index", "edge_shifts", "cell", "pbc", "energy", "forces", "batch"):
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


def test_an_entry_is_used_again_and_equals_what_is_built_in_memory(kept, request_, builds):
    first = frame_arrays(request_)
    again = frame_arrays(request_)
    assert builds == ["a.xyz"]
    assert first.folder == again.folder
    assert again.folder is not None
    assert isinstance(again["positions"], np.memmap)
    memory = build_frame_set(list(read_frames(request_.paths[0])), 3.0, ENERGIES, "a.xyz")
    assert_equal_sets(FrameSet.from_arrays(again), memory)
    assert statistics(again, ENERGIES) == statistics(memory.arrays, ENERGIES)


def test_small_sets_leave_no_trace(kept, request_, monkeypatch):
    monkeypatch.setattr(arrays_module, "IN_MEMORY", 1 << 20)
    assert frame_arrays(request_).folder is None
    assert not kept.exists()


@pytest.mark.parametrize("change", ["cutoff", "contents", "units", "keys", "drawn", "seed"])
def test_whatever_decides_the_contents_makes_another_entry(kept, request_, builds, change):
    from dataclasses import replace

    from equimd.frames import LabelKeys, UnitSpec

    drawn = replace(request_, n_frames=5)
    before = frame_arrays(drawn if change == "seed" else request_)
    if change == "contents":
        write_frames(request_.paths[0], spring_frames(12, 1))
        other = request_
    else:
        other = {
            "cutoff": replace(request_, cutoff=2.5),
            "units": replace(request_, units=UnitSpec(energy="meV")),
            "keys": replace(request_, keys=LabelKeys(energy="energy")),
            "drawn": drawn,
            "seed": replace(drawn, seed=1),
        }[change]
    after = frame_arrays(other)
    assert len(builds) == 2
    assert before.folder != after.folder


def test_a_path_or_a_time_does_not_make_another_entry(kept, request_, builds, tmp_path):
    before = frame_arrays(request_)
    moved = tmp_path / "elsewhere.xyz"
    os.rename(request_.paths[0], moved)
    os.utime(moved, (1, 1))
    assert frame_arrays(Request((moved,), None, None, 3.0)).folder == before.folder
    assert builds == ["a.xyz"]


@pytest.mark.parametrize("name", ["positions.bin", "meta.json"])
def test_an_entry_that_is_not_whole_is_built_again(kept, request_, builds, name):
    folder = frame_arrays(request_).folder
    assert folder is not None
    with open(folder / name, "r+b") as file:
        file.truncate(10)
    arrays = frame_arrays(request_)
    assert len(builds) == 2
    assert len(arrays) == 12
    assert frame_arrays(request_).folder == folder
    assert len(builds) == 2


def test_an_interrupted_build_leaves_nothing_and_loses_nothing(kept, request_, tmp_path, monkeypatch):
    whole = frame_arrays(request_).folder
    write_frames(tmp_path / "b.xyz", spring_frames(300, 1))
    other = Request((tmp_path / "b.xyz",), None, None, 3.0)
    original, calls = arrays_module.Writer.append, []

    def dies(self, chunk):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(arrays_module.Writer, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            frame_arrays(other)
    assert [path for path in kept.iterdir() if path.is_dir()] == [whole]
    assert len(frame_arrays(other)) == 300


def test_leftovers_of_a_killed_build_are_removed(kept, request_):
    key = cache._key(request_)
    left = kept / f"{key}.abc.tmp"
    left.mkdir(parents=True)
    (left / "positions.bin").write_bytes(b"half")
    frame_arrays(request_)
    assert not left.exists()
    assert not list(kept.glob("*.tmp"))


def test_leftovers_of_other_builds_are_removed_when_they_are_old(kept, request_):
    old, grows, young = (kept / f"{name}.abc.tmp" for name in ("old", "grows", "young"))
    for folder in (old, grows, young):
        folder.mkdir(parents=True)
        (folder / "positions.bin").write_bytes(b"half")
    long_ago = (time.time() - 30 * 86400,) * 2
    os.utime(old / "positions.bin", long_ago)
    os.utime(old, long_ago)
    os.utime(grows, long_ago)
    frame_arrays(request_)
    assert not old.exists()
    assert grows.exists()
    assert young.exists()


def test_entries_that_nobody_uses_are_deleted(kept, request_, tmp_path):
    old = frame_arrays(request_).folder
    assert old is not None
    write_frames(tmp_path / "b.xyz", spring_frames(3, 1))
    os.utime(old / "meta.json", (time.time() - 80 * 86400,) * 2)
    frame_arrays(Request((tmp_path / "b.xyz",), None, None, 3.0))
    assert old.exists()
    os.utime(old / "meta.json", (time.time() - 100 * 86400,) * 2)
    frame_arrays(request_)  # using it makes it young
    frame_arrays(Request((tmp_path / "b.xyz",), None, None, 2.0))
    assert old.exists()
    os.utime(old / "meta.json", (time.time() - 100 * 86400,) * 2)
    frame_arrays(Request((tmp_path / "b.xyz",), None, None, 2.5))
    assert not old.exists()


def test_a_full_disk_is_one_line(kept, request_, monkeypatch):
    def full(self, chunk):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrays_module.Writer, "append", full)
    with pytest.raises(FailedError, match=r"cannot keep the graphs of .*a.xyz .*: No space left .* set EQUIMD_CACHE"):
        frame_arrays(request_)
    assert not [path for path in kept.iterdir() if path.is_dir()]


@pytest.mark.parametrize("n_frames", [None, 5])
def test_an_error_while_reading_is_told_of_the_file(kept, request_, monkeypatch, n_frames):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Frames, "select" if n_frames is None else "__len__", fails)
    with pytest.raises(InputError, match=r"cannot read .*a.xyz: Input/output error"):
        frame_arrays(Request(request_.paths, None, None, 3.0, n_frames))


@pytest.mark.parametrize("is_first", [True, False])
def test_limits_of_memory_are_one_line(kept, request_, monkeypatch, is_first):
    if not is_first:
        frame_arrays(request_)

    def full(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", full)
        with pytest.raises(FailedError, match=r"cannot map the graphs of .*a.xyz .*: Cannot allocate memory"):
            frame_arrays(request_)


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(tmp_path, monkeypatch, request_):
    (tmp_path / "file").write_text("no folder can be made here")
    monkeypatch.setattr(cache, "graphs_folder", lambda: tmp_path / "file" / "graphs")
    monkeypatch.setattr(arrays_module, "IN_MEMORY", 0)
    arrays = frame_arrays(request_)
    assert len(arrays) == 12
    assert arrays.folder is not None
    assert tmp_path not in arrays.folder.parents


def test_who_starts_while_another_builds_waits_for_it(kept, request_, monkeypatch):
    # Threads stand for processes: a lock belongs to the file that was opened.
    original, writers = arrays_module.Writer.__init__, []
    both = threading.Barrier(2)

    def slow(self, folder):
        writers.append(folder)
        time.sleep(0.1)
        original(self, folder)

    def start(_):
        both.wait()
        return frame_arrays(request_)

    monkeypatch.setattr(arrays_module.Writer, "__init__", slow)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(start, range(2))
    assert len(writers) == 1
    assert one.folder == other.folder
    np.testing.assert_array_equal(one["positions"], other["positions"])


def test_a_subset_reads_no_more_than_it_needs(kept, tmp_path, monkeypatch):
    from equimd.frames import extxyz

    write_frames(tmp_path / "a.xyz", spring_frames(40, 0))
    write_frames(tmp_path / "b.xyz", spring_frames(20, 1))
    parsed = []
    original = extxyz._read_frame
    monkeypatch.setattr(extxyz, "_read_frame", lambda *given: parsed.append(given) or original(*given))
    arrays = frame_arrays(Request((tmp_path / "a.xyz", tmp_path / "b.xyz"), None, None, 3.0, n_frames=7, seed=5))
    chosen = subset(60, 7, 5)
    assert chosen is not None
    assert arrays["index"].tolist() == chosen.tolist()
    assert len(parsed) == 7
    frames = spring_frames(40, 0) + spring_frames(20, 1)
    for k, index in enumerate(chosen):
        np.testing.assert_allclose(arrays.frame(k)["positions"], frames[index].positions, atol=1e-7)
    with pytest.raises(InputError, match="n_train is 99; the file has 60 frames"):
        frame_arrays(Request((tmp_path / "a.xyz", tmp_path / "b.xyz"), None, None, 3.0, n_frames=99))


def test_hashes_of_large_files_are_remembered_until_they_change(kept, tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(b"x" * (cache._REMEMBERED + 1))
    os.utime(path, (time.time() - 100,) * 2)
    first = file_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(cache.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert file_sha256(path) == first
    path.write_bytes(b"y" * (cache._REMEMBERED + 1))
    second = file_sha256(path)  # just now changed: not remembered, it may change again at once
    assert second != first
    assert [json.loads(note.read_text())["sha256"] for note in (kept / "files").iterdir()] == [first]
    with pytest.raises(InputError, match="no such file"):
        file_sha256(tmp_path / "nowhere")


def test_large_sets_stay_on_the_host(request_, monkeypatch):
    from equimd.training import data

    frames = FrameSet.from_arrays(frame_arrays(request_))
    monkeypatch.setattr(data, "_ON_DEVICE", 0)
    there = frames.to(torch.device("meta"))
    assert there.positions.device.type == "cpu"
    assert there.batch(torch.tensor([3, 1])).positions.device.type == "meta"
    monkeypatch.setattr(data, "_ON_DEVICE", 1 << 30)
    assert frames.to(torch.device("meta")).positions.device.type == "meta"


def test_the_folder_is_beside_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIMD_CACHE", str(tmp_path))
    assert graphs_folder() == tmp_path / "graphs"


def test_devices_and_pipes_are_refused_before_they_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.xyz")
    for path in (Path("/dev/zero"), tmp_path / "fifo.xyz"):
        with pytest.raises(InputError, match="is a device, a pipe or a socket; accepted: a regular file"):
            file_sha256(path)
