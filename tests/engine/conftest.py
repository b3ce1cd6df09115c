"""What tests of the engine share: pages counted after every step, and preemptions noted."""

from typing import Any

import pytest

from fastrl.engine.generation import Generation
from fastrl.engine.scheduler import Scheduler


@pytest.fixture
def pages_checked_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step ends with all pages accounted for, and every call with all of them free."""
    step, cancel = Generation.step, Generation.cancel

    def checked_step(self: Generation) -> None:
        step(self)
        self.scheduler.check()

    def checked_cancel(self: Generation, *arguments: Any) -> None:
        cancel(self, *arguments)
        self.scheduler.check()
        if self.is_finished:
            assert self.cache.num_free == self.cache.num_pages

    monkeypatch.setattr(Generation, "step", checked_step)
    monkeypatch.setattr(Generation, "cancel", checked_cancel)


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which a request was preempted."""
    steps: list[int] = []
    preempt = Scheduler._preempt

    def counted(self: Scheduler, request: Any, step: int) -> None:
        steps.append(step)
        preempt(self, request, step)

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    return steps
