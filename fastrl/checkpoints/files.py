"""Every change that a checkpoint makes to a disk, one method each.

A subclass of `Files` sees all of them in order: that is how faults are injected and how the log of
operations for a power loss is recorded (`fastrl.selftest`).
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

_READ_BYTES = 1 << 22


class Files:
    """The operating system's calls; each may raise OSError."""

    def make_folder(self, path: Path) -> None:
        """A new empty folder."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """A new empty file, open for writing; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write at the end; returns how many bytes were taken, which may be fewer."""
        return os.write(descriptor, data)

    def open_folder(self, path: Path) -> int:
        """A folder's descriptor, for `fsync`."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def fsync(self, descriptor: int) -> None:
        """Returns when the file's data, or the folder's entries, are on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Give a descriptor back."""
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a folder another name, at once."""
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        """Remove a file, or a link itself."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


def write_all(files: Files, descriptor: int, data: memoryview) -> None:
    """Write all of `data`, in as many calls as it takes."""
    while data:
        data = data[files.write(descriptor, data):]


def sync_folder(files: Files, path: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = files.open_folder(path)
    try:
        files.fsync(descriptor)
    finally:
        files.close(descriptor)


def make_durable_folder(files: Files, path: Path) -> None:
    """Make a folder and those above it that are missing; its name outlives a power loss."""
    if not path.is_dir():
        if not path.parent.is_dir():
            make_durable_folder(files, path.parent)
        files.make_folder(path)
    sync_folder(files, path.parent)


def remove_tree(files: Files, path: Path) -> None:
    """Remove a folder and all in it; links are removed, not followed."""
    if path.is_symlink() or not path.is_dir():
        files.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        remove_tree(files, entry)
    files.remove_folder(path)


def read_file(path: Path) -> Iterator[bytes]:
    """The bytes of a regular file, piece by piece.

    Raises:
        OSError: when it cannot be read, or is a link, a pipe or another thing that is no file.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(f"{path.name} is not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while chunk := os.read(descriptor, _READ_BYTES):
            yield chunk
    finally:
        os.close(descriptor)
