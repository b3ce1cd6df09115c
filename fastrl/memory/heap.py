"""What this process has freed goes back to the system, where the C library would keep it."""

import ctypes
import mmap
import sys
from functools import cache

import torch


def drop_pages(storage: torch.UntypedStorage) -> None:
    """Give the whole pages of memory that is freed next to the system.

    GNU's C library keeps what lies at the end of a heap that another mapping has cut off.
    """
    madvise = _c_function("madvise") if sys.platform == "linux" else None
    page = mmap.PAGESIZE
    begin = -(-storage.data_ptr() // page) * page
    num_bytes = (storage.data_ptr() + storage.nbytes()) // page * page - begin
    if madvise is not None and num_bytes > 0:  # where the system refuses, it is freed all the same
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """The C library keeps what is freed in small pieces; GNU's can be told to return it."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _c_function(name: str) -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), name, None)
