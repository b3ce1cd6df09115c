"""SIGTERM ends a command as Ctrl-C does: what is open is closed, the terminal is as it was."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(slots=True)
class Request:
    """The signal that came inside `deferred`."""

    signal: int | None = None

    def answer(self) -> None:
        """Raise what the signal would have raised, once."""
        number, self.signal = self.signal, None
        if number == signal.SIGTERM:
            raise Terminated
        if number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[Request]:
    """Inside the block the first SIGTERM or Ctrl-C is noted alone; the next one acts at once.

    Signals that nobody handles, or that are ignored, stay as they are, and so do all of them in
    threads other than the main one. A request that nobody answered is answered at the end.
    """
    request = Request()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)
                and not isinstance(handler, signal.Handlers)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()
        # Not print: a signal may come in the middle of another one.
        os.write(2, b"\nfastrl: stops after this step or in this rollout, with a checkpoint; "
                    b"a second signal stops at once\n")

    for number in handlers:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
    request.answer()
