"""Files whose n-th operation fails, once or from then on."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastrl.checkpoints.files import Files

T = TypeVar("T")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "EACCES": errno.EACCES}
FAULTS = (*ERRORS, "short", "kill")
"""Errors by name, writes that take half of what they are given, and the end of the process."""


class Killed(BaseException):
    """Stands for the end of the process: no operation follows it."""


class FaultyFiles(Files):
    """The disk, with one fault.

    Args:
        number: Operation that fails, from 1.
        fault: One of `FAULTS`.
        is_persistent: All later operations fail too.
    """

    def __init__(self, number: int, fault: str, *, is_persistent: bool = False) -> None:
        self.number, self.fault, self.is_persistent = number, fault, is_persistent
        self.count = 0
        """Operations so far; below `number` at the end when the fault was not reached."""

    def _do(self, action: Callable[[], T]) -> T:
        if self._fails():
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))
        return action()

    def _fails(self) -> bool:
        self.count += 1
        is_due = (self.count >= self.number if self.is_persistent or self.fault == "kill"
                  else self.count == self.number)
        if is_due and self.fault == "kill":
            raise Killed
        return is_due and self.fault != "short"

    def make_folder(self, path: Path) -> None:
        self._do(lambda: super(FaultyFiles, self).make_folder(path))

    def create(self, path: Path) -> int:
        return self._do(lambda: super(FaultyFiles, self).create(path))

    def write(self, descriptor: int, data: memoryview) -> int:
        half = data[:max(1, len(data) // 2)]
        is_due = self.count + 1 >= self.number
        if is_due and self.fault != "short" and self.count + 1 == self.number:
            super().write(descriptor, half)  # an error comes after a part has been written
        return self._do(lambda: super(FaultyFiles, self).write(
            descriptor, half if is_due and self.fault == "short" else data))

    def open_folder(self, path: Path) -> int:
        return self._do(lambda: super(FaultyFiles, self).open_folder(path))

    def fsync(self, descriptor: int) -> None:
        self._do(lambda: super(FaultyFiles, self).fsync(descriptor))

    def rename(self, old: Path, new: Path) -> None:
        self._do(lambda: super(FaultyFiles, self).rename(old, new))

    def unlink(self, path: Path) -> None:
        self._do(lambda: super(FaultyFiles, self).unlink(path))

    def remove_folder(self, path: Path) -> None:
        self._do(lambda: super(FaultyFiles, self).remove_folder(path))
