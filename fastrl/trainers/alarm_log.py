"""The alarms of a run: said once, counted in every row of metrics, listed in `alarms.jsonl`."""

import logging
import math
from collections.abc import Mapping
from dataclasses import astuple

from fastrl.alarms import REMEMBERED, Alarm, Circumstances, Past, find_alarms
from fastrl.checkpoints import State
from fastrl.config import TrainConfig
from fastrl.errors import NumericsError
from fastrl.metrics import RunFolder

logger = logging.getLogger("fastrl")

FILE = "alarms.jsonl"
"""Of the run folder: a row for every step at which an alarm begins."""


class AlarmLog:
    """Looks at every step of a trainer.

    Args:
        config: `stop_at_alarms` says which alarms end the run.
        facts: What metrics are judged by.
        folder: Gets `alarms.jsonl`; None writes nothing.
    """

    def __init__(
        self, config: TrainConfig, facts: Circumstances, folder: RunFolder | None = None
    ) -> None:
        self.config, self.facts, self.folder = config, facts, folder
        self.counts: dict[str, int] = {}
        """Steps so far with each alarm."""
        self.current: list[Alarm] = []
        """Alarms of the last step."""
        self._past: dict[str, Past] = {}

    def look(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Find the alarms of a step; say those that the run has not had before.

        Args:
            step: Finished steps, from 1.
            metrics: Of the step.
        Returns:
            Steps so far with each alarm that the run has had: `alarm/` metrics.
        """
        before = {alarm.name for alarm in self.current}
        alarms = {alarm.name: alarm
                  for alarm in find_alarms(step, metrics, self._past, self.facts)}
        self.current = list(alarms.values())
        for alarm in self.current:
            if alarm.name not in self.counts:
                logger.warning("step %d: %s", step, alarm)
            if alarm.name not in before and self.folder is not None:
                self.folder.append(FILE, {"step": step, "alarm": alarm.name,
                                          "reason": alarm.reason, "advice": alarm.advice})
            self.counts[alarm.name] = self.counts.get(alarm.name, 0) + 1
        for name, value in metrics.items():
            if name in REMEMBERED and math.isfinite(value):
                past = self._past.get(name)
                self._past[name] = Past.of(value) if past is None else past | value
        return {f"alarm/{name}": float(count) for name, count in self.counts.items()}

    def stop_if_asked(self, step: int) -> None:
        """End the run where the last step had an alarm that is to end it.

        Raises:
            NumericsError: says the alarm.
        """
        for alarm in self.current:
            if alarm.name in self.config.stop_at_alarms:
                raise NumericsError(f"step {step}: expected no alarm of stop_at_alarms, got "
                                    f"{alarm}")

    def state(self) -> State:
        """Counts, the alarms that are on, and the course of each metric."""
        return State(values={
            "counts": dict(self.counts),
            "current": [[alarm.name, alarm.reason] for alarm in self.current],
            "past": {name: list(astuple(past)) for name, past in self._past.items()}})

    def load_state(self, state: State) -> None:
        """Go on where `state` was taken."""
        values = state.copy_to("alarms", {}, ("counts", "current", "past"))
        self.counts = dict(values["counts"])
        self.current = [Alarm(name, reason) for name, reason in values["current"]]
        self._past = {name: Past(*course) for name, course in values["past"].items()}
