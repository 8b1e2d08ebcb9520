"""Freed memory goes back to the system, on Linux with glibc."""

import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from lrcompress import heap

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of this process in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(heap._malloc_trim is None or not STATUS.exists(), reason="no malloc_trim of glibc here")
def test_what_threads_freed_is_given_back():
    size, kept = 60_000, []  # bytes: below the size from which each block is mapped by itself

    def work() -> None:
        held = [torch.ones(size // 4) for _ in range(1000)]
        kept.append(torch.ones(size // 4))  # the last block stays, so the heap cannot shrink by itself
        del held

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    before = resident()
    heap.trim()
    assert resident() < before - size * 500
    assert all((one == 1).all() for one in kept)


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert heap._found() is None
    monkeypatch.setattr(heap, "_malloc_trim", None)
    heap.trim()
