"""Tensors in memory-mapped files."""

import os
import threading
from collections import deque
from pathlib import Path

import pytest
import torch

from fxprune.offload import files
from fxprune.offload.files import offload_to, offloaded, sync_writes, write_back
from tests.forked import in_processes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_an_offloaded_tensor_is_as_it_was_and_leaves_no_file(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randint(100, (300, 401)).to(dtype).t()
    with offload_to(tmp_path):
        found = offloaded(value)
        small = torch.ones(3)
        assert offloaded(small) is small, "a mapping takes whole pages"
    assert torch.equal(found, value) and found.dtype == dtype and found.data_ptr() != value.data_ptr()
    assert list(tmp_path.iterdir()) == []
    found.add_(1)
    assert torch.equal(found, value + 1)
    assert offloaded(value) is value, "outside the context tensors stay in memory"


def test_files_are_written_while_the_next_tensors_are_made_few_bytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was waited for, as long as scoring itself took where others used the disk too."""
    value = torch.randn(200, 100)
    go, written = threading.Event(), list[int]()
    monkeypatch.setattr(os, "fsync", lambda handle: written.append(handle) if go.wait(60) else None)
    monkeypatch.setattr(files, "_UNWRITTEN", 2 * value.nbytes)
    monkeypatch.setattr(files, "_writes", writes := deque())
    with offload_to(tmp_path):
        found = [offloaded(value), offloaded(value)]
        assert written == [] and len(writes) == 2
        threading.Timer(0.05, go.set).start()
        found.append(offloaded(value))
        assert written and len(writes) <= 2, "the third waits for the first"
    assert len(written) == 3 and not writes and all(torch.equal(one, value) for one in found)


def test_a_share_of_the_elements_is_kept(tmp_path: Path) -> None:
    value = torch.randn(300, 401)
    with offload_to(tmp_path):
        found = offloaded(value, slice(1000, 60000))
    assert found.shape == value.shape and torch.equal(found.view(-1)[1000:60000], value.view(-1)[1000:60000])
    assert not found.view(-1)[:1000].any() and not found.view(-1)[60000:].any()


def test_what_changes_in_a_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that changed could not be evicted, and a limit on memory ended the run."""
    synced = list[torch.Tensor]()
    sync = files._sync_pages
    monkeypatch.setattr(files, "_sync_pages", lambda tensor: synced.append(tensor) or sync(tensor))
    value = torch.randn(200, 100)
    write_back(value)
    assert synced == [], "nothing is in a file"
    with offload_to(tmp_path):
        found = offloaded(value)
        found.add_(1)
        write_back(found)
        write_back(found.view(-1)[111:])
        write_back(torch.ones(3))
    assert [one.data_ptr() for one in synced] == [found.data_ptr(), found.view(-1)[111:].data_ptr()]
    assert torch.equal(found, value + 1)
    monkeypatch.setattr(files, "_sync_pages", sync)
    nowhere = type("Nowhere", (), {"data_ptr": lambda self: 1 << 20, "nbytes": 1 << 20})()
    with pytest.raises(OSError, match=r"allocate|memory"):
        sync(nowhere)


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(28, "no room")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(files, "_UNWRITTEN", 0)
    with offload_to(tmp_path), pytest.raises(OSError, match="no room"):
        offloaded(torch.randn(200, 100))
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_synced_as_they_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of memory counted pages of the slim model that were not on the disk, and the process was killed."""
    synced, seen = list[int](), threading.Event()

    def fsync(handle: int) -> None:
        synced.append(os.fstat(handle).st_size)
        seen.set()

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "out").mkdir()
    with offload_to(tmp_path), sync_writes(tmp_path / "out"):
        for part in (b"some", b"more"):
            with open(tmp_path / "out" / "weights", "ab") as file:
                file.write(part)
            assert seen.wait(60)
            seen.clear()
    assert synced == [4, 8], "each time it grew, and not again"
    threads = threading.active_count()
    with sync_writes(tmp_path):
        assert threading.active_count() == threads, "in memory there is nothing to do"


def test_a_process_that_is_forked_writes_with_threads_of_its_own(tmp_path: Path) -> None:
    """Those of the first process are not there after a fork, and what they should have written was waited for."""
    value = torch.randn(200, 100)

    def write(_: int = 0) -> bool:
        with offload_to(tmp_path):
            return torch.equal(offloaded(value), value)

    assert write() and in_processes(write, 1, tmp_path) == [True]
