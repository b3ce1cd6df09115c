"""When a trainer's state is saved: between two steps, by steps or minutes, and when asked to stop.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from fastrl.checkpoints.state import State
from fastrl.checkpoints.store import CheckpointStore
from fastrl.config.train import TrainConfig
from fastrl.continuation import FOLDER, file_sizes
from fastrl.errors import CheckpointError
from fastrl.interrupt import Request, deferred
from fastrl.metrics import RunFolder

logger = logging.getLogger("fastrl")


class Saver:
    """Saves while a trainer trains; a context. SIGTERM and Ctrl-C inside it wait for a checkpoint.

    Args:
        config: Its `save_` settings count.
        run: Whose folder gets the checkpoints; None: nothing is saved, signals act at once.
        state: The trainer's `state`.
    """

    def __init__(self, config: TrainConfig, run: RunFolder | None,
                 state: Callable[[], State]) -> None:
        self.config, self.run, self._state = config, run, state
        self._store = None if run is None else CheckpointStore(run.path / FOLDER,
                                                               keep=config.save_total_limit)
        self._exits, self._request, self._saved_at = ExitStack(), Request(), time.monotonic()
        self._step, self._is_discarded = 0, False

    def __enter__(self) -> "Saver":
        if self.run is not None:
            self._request = self._exits.enter_context(deferred())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._exits.close()
        if self._store is None:
            return
        try:
            if self._is_discarded and self._step:
                self._save()
            self._store.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)

    def after_step(self, step: int) -> None:
        """Save where it is due.

        Args:
            step: Finished steps; everything that belongs to them has been written to the run.
        Raises:
            Terminated, KeyboardInterrupt: the signal that came, when the checkpoint is durable.
            CheckpointError: when the disk does not take this checkpoint, or the one before.
        """
        if self._store is None:
            return
        self._step = step
        if self._request.signal is not None or self._is_due(step):
            self._save()
        if self._request.signal is not None:
            self._store.wait()
            self._request.answer()

    def in_rollout(self, *progress: int) -> None:
        """`on_progress` of a rollout that nothing has been learned from yet: a signal ends it.

        The state is still that of the last step, and is saved when the trainer has left the block.

        Raises:
            Terminated, KeyboardInterrupt: the signal that came.
        """
        if self._request.signal is not None:
            self._is_discarded = True
            self._request.answer()

    def _save(self) -> None:
        assert self.run is not None and self._store is not None
        self._store.save(self._step, self._state(), facts={"stage": self.run.stage,
                                                           "files": file_sizes(self.run.path)})
        self._saved_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        steps, minutes = self.config.save_steps, self.config.save_minutes
        if steps is not None:
            return step % steps == 0
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
