"""SIGTERM ends a command as Ctrl-C does: what is open is closed, the terminal is as it was."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""What a process returns that SIGTERM has ended: 143."""


class Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that nothing that handles errors takes it for one."""


@contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Inside the block the first SIGTERM raises `Terminated`, and a second one ends the process.

    Threads other than the main one cannot be told, and leave signals as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
