"""Tensors out of the way while nothing needs them: memory is given back, and they stay as they are.

A storage is emptied and filled again, so whatever shares it comes along: tied weights, views, the
optimiser's references. Tensors whose addresses have to stay lie in an arena instead
(`fastrl.memory.addresses`). Gradients are storages of their own and not touched. Bytes are copied,
not numbers: NaN comes back with its payload.

From a GPU they go into host memory of exactly their size, registered for fast copies (torch's own
pinned memory rounds up to powers of two); from the CPU's memory into a memory-mapped file.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.errors import ConfigError
from fastrl.memory.addresses import FixedAddresses
from fastrl.memory.arena import arena_of, can_keep_addresses
from fastrl.memory.guard import Guard
from fastrl.memory.heap import drop_pages, trim_heap


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The distinct storages behind some tensors, by identity, in order."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


class ParkingPlace:
    """Where one group of tensors goes; it keeps its size for the next time.

    Args:
        name: Of the group, for messages.
        device: Where the tensors live.
        folder: On a CPU, where the file lies (deleted at once, so that it goes with the process);
            None: the system's folder for temporary files.
        is_constant: The tensors never change, so that they are copied out once only.
        phases: That need the tensors, for messages.
        keeps_addresses: From the first `fetch` on the tensors always come back to where they were;
            where the device cannot do that, they come back anywhere.
    """

    def __init__(self, name: str, device: torch.device, folder: Path | None = None, *,
                 is_constant: bool = False, keeps_addresses: bool = False,
                 phases: Iterable[str] = ()) -> None:
        self.name, self.device, self.folder, self.is_constant = name, device, folder, is_constant
        self._keeps_addresses = keeps_addresses and can_keep_addresses(device)
        self._addresses: FixedAddresses | None = None
        """Of what is parked, where that comes back to where it was."""
        self._guard = Guard(name, phases)
        self._parked: list[tuple[torch.UntypedStorage, int]] = []
        """Emptied storages and their bytes."""
        self._host: Tensor | None = None
        self._mapping: mmap.mmap | None = None
        self._known: list[tuple[int, int]] = []
        """Identity and bytes of the storages whose content the host memory has."""
        self._fetch: Future[None] | torch.cuda.Event | None = None
        self._unregister: Callable[[], Any] | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def is_parked(self) -> bool:
        """True from `park` until the end of `fetch`."""
        return bool(self._parked)

    @property
    def is_fetching(self) -> bool:
        """True from `start_fetch` until the end of `fetch`."""
        return self._fetch is not None

    @property
    def num_bytes(self) -> int:
        """Bytes that are parked here now."""
        return sum(size for _, size in self._parked)

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors' memory to the host and give it back.

        Until `fetch` they have shapes but no content, and refuse to be read. Where this raises,
        they are as before.

        Raises:
            ConfigError: when the host has no room, or a tensor's memory is not its own.
        """
        assert not self._parked, f"{self.name} is parked already"
        tensors = list(tensors)
        storages = [s for s in storages_of(tensors).values() if s.nbytes() > 0]
        self._check_owned(storages)
        sizes = [storage.nbytes() for storage in storages]
        known = [(s._cdata, size) for s, size in zip(storages, sizes, strict=True)]
        if not (self.is_constant and known == self._known):
            self._known = []
            self._copy_out(storages, self._room(sum(sizes)))
            self._known = known
        if storages and (self._keeps_addresses or any(map(arena_of, storages))):
            self._addresses = FixedAddresses(self.device)
            storages = self._addresses.leave(tensors, storages)
        else:
            for storage in storages:
                if self._stream is None:
                    drop_pages(storage)
                storage.resize_(0)
        self._parked = list(zip(storages, sizes, strict=True))
        self._guard.close(tensors)
        self._release()

    def start_fetch(self, pool: ThreadPoolExecutor) -> None:
        """Begin to bring the tensors back beside what computes now; `fetch` waits for the end.

        Args:
            pool: Does it on a CPU; a GPU has its own queue of copies.
        """
        if not self._parked or self._fetch is not None:
            return
        if self._stream is None:
            self._fetch = pool.submit(self._copy_back)
        else:
            self._fetch = self._queue_copies(self._stream)

    def fetch(self) -> None:
        """Bring the tensors back; every bit is as it was."""
        if not self._parked:
            return
        begun, self._fetch = self._fetch, None
        if self._stream is not None:
            event = begun or self._queue_copies(self._stream)
            assert isinstance(event, torch.cuda.Event)
            torch.cuda.current_stream(self.device).wait_event(event)
        elif isinstance(begun, Future):
            begun.result()
        else:
            self._copy_back()
        self._parked = []
        self._guard.open()

    def close(self) -> None:
        """Give the host memory back; the tensors must have been fetched."""
        assert not self._parked, f"{self.name} is still parked"
        if self._unregister is not None and self._stream is not None:
            self._stream.synchronize()
            self._unregister()
            self._unregister = None
        self._host, self._mapping, self._known = None, None, []

    def _check_owned(self, storages: list[torch.UntypedStorage]) -> None:
        for storage in storages:
            if not storage.resizable() and arena_of(storage) is None:
                raise ConfigError(
                    f"parking: expected {self.name} to own its memory, got {storage.nbytes()} bytes"
                    " that belong to a file, to numpy or to another library; clone() these tensors "
                    "first, or set parking to off")

    def _room(self, num_bytes: int) -> Tensor:
        """Host memory [num_bytes] uint8, the same as before where the size is."""
        if self._host is None or len(self._host) != num_bytes:
            self.close()
            self._host = self._registered(num_bytes) if self._stream else self._mapped(num_bytes)
        return self._host

    def _mapped(self, num_bytes: int) -> Tensor:
        """A file's bytes as a tensor."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if num_bytes == 0:
                    return torch.zeros(0, dtype=torch.uint8)
                # Room is taken now: a store into a mapped file on a full disk kills the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                else:
                    file.truncate(num_bytes)
                self._mapping = mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise ConfigError(
                f"parking: expected {num_bytes / 2**20:.0f} MiB of disk for {self.name} in {where},"
                f" got {error.strerror or error}; make room there, set TMPDIR to a larger disk, or "
                "set parking to off") from error
        return torch.frombuffer(self._mapping, dtype=torch.uint8)

    def _registered(self, num_bytes: int) -> Tensor:
        """Page-locked host memory as a tensor."""
        if num_bytes == 0:
            return torch.zeros(0, dtype=torch.uint8, device="cpu")
        try:
            self._mapping = mmap.mmap(-1, num_bytes)
            with suppress(OSError, AttributeError):  # fewer pages to lock
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            host = torch.frombuffer(self._mapping, dtype=torch.uint8)
            torch.cuda.check_error(_cudart().cudaHostRegister(host.data_ptr(), num_bytes, 0))
        except (OSError, RuntimeError) as error:
            self._mapping = None
            raise ConfigError(
                f"parking: expected {num_bytes / 2**30:.1f} GiB of host memory for {self.name} that"
                f" can be page-locked, got {error}; free host memory, raise the limit of `ulimit "
                "-l`, or set parking to off") from error
        self._unregister = weakref.finalize(self, _unregister, host)
        return host

    def _copy_out(self, storages: list[torch.UntypedStorage], host: Tensor) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        offset = 0
        with torch.cuda.stream(self._stream):
            for storage in storages:
                end = offset + storage.nbytes()
                host[offset:end].copy_(_bytes(storage), non_blocking=True)
                offset = end
        if self._stream is not None:
            self._stream.synchronize()

    def _copy_back(self) -> None:
        """The way back on a CPU."""
        self._take_memory()
        self._fill()
        self._drop_mapped()

    def _queue_copies(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """The way back on a stream of its own; memory is taken by the stream that will use it."""
        self._take_memory()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._fill()
        event: torch.cuda.Event = stream.record_event()
        return event

    def _take_memory(self) -> None:
        """Memory of any content for what is parked."""
        if self._addresses is not None:
            sizes = [size for _, size in self._parked]
            self._parked = list(zip(self._addresses.come_back(sizes), sizes, strict=True))
            self._addresses = None
            return
        for storage, size in self._parked:
            storage.resize_(size)

    def _fill(self) -> None:
        offset = 0
        for storage, size in self._parked:
            assert self._host is not None
            _bytes(storage).copy_(self._host[offset:offset + size], non_blocking=True)
            offset += size

    def _release(self) -> None:
        """Hand the freed memory on: to the other streams and sizes of a GPU, or to the system."""
        if self._stream is not None:
            torch.cuda.empty_cache()
            return
        if self._mapping is not None:
            self._mapping.flush()
        self._drop_mapped()
        trim_heap()

    def _drop_mapped(self) -> None:
        """On a CPU: the file keeps the bytes, this process no page of it."""
        if self._stream is None and self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[n] uint8 over a storage's memory."""
    return torch.tensor([], dtype=torch.uint8, device=storage.device).set_(storage)


def _unregister(host: Tensor) -> None:
    """Before its memory goes: else the next tensor at this address could not be registered."""
    _cudart().cudaHostUnregister(host.data_ptr())


def _cudart() -> Any:
    """torch's binding of the CUDA runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
