"""Memory that was freed, given back to the system."""

import ctypes
import sys
from collections.abc import Callable


def trim() -> None:
    """Give freed heap memory back, where the C library can (glibc's malloc_trim); elsewhere nothing happens.

    glibc keeps what is freed for each thread that freed it, which adds up where many threads take turns.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def _found() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


_malloc_trim = _found()
