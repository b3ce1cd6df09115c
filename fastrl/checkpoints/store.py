"""The checkpoints of a run: written beside, made durable, then renamed, in that order.

    <folder>/step-00000012            a checkpoint
    <folder>/step-00000014.writing    one that is being written
    <folder>/step-00000010.deleting   one that is being removed

At every moment, whatever fails, all folders without an ending are whole or were damaged later.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from fastrl.checkpoints.checkpoint import (
    Checkpoint,
    folder_name,
    is_best_checkpoint,
    step_of,
    write_checkpoint,
)
from fastrl.checkpoints.files import Files, make_durable_folder, remove_tree, sync_folder
from fastrl.checkpoints.state import State
from fastrl.errors import CheckpointError, ConfigError

WRITING, DELETING = ".writing", ".deleting"
log = logging.getLogger("fastrl")


class CheckpointStore:
    """Saves and finds the checkpoints of one run. One process at a time may save.

    Args:
        folder: Made when the first checkpoint is saved.
        keep: How many of the newest stay; the best one stays besides.
        in_background: Write in a thread, so that `save` takes as long as a copy of the state.
        files: What changes the disk.
    Raises:
        ConfigError: when `keep` is below 1.
    """

    def __init__(self, folder: Path | str, *, keep: int = 2, in_background: bool = True,
                 files: Files | None = None) -> None:
        if keep < 1:
            raise ConfigError(f"save_total_limit: expected at least 1, got {keep}; change "
                              "save_total_limit")
        self.folder, self.keep, self.in_background = Path(folder), keep, in_background
        self._files = files or Files()
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: State, *, facts: Mapping[str, Any] | None = None,
             is_best: bool = False) -> None:
        """Copy the state and write it; older checkpoints go when it is durable.

        What happens to the state's tensors after the return reaches no file. A whole checkpoint of
        the same step stays as it is: equal steps have equal states.

        Args:
            step: Finished steps; its checkpoint is named after it.
            state: What `load` will give back.
            facts: Plain values beside it, such as lineage and settings.
            is_best: Keep this one until a better one comes.
        Raises:
            CheckpointError: when this write failed, or the one before in the background; those
                before are intact then.
        """
        self.wait()
        copy, facts = state.copied(), State(values=dict(facts or {})).copied().values
        if not self.in_background:
            self._write(step, copy, facts, is_best)
            return
        self._thread = Thread(target=self._try_write, args=(step, copy, facts, is_best),
                              name=f"fastrl checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is durable.

        Raises:
            CheckpointError: when it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None where there is none yet. Changes nothing.

        Damaged ones are named in a warning, and the one before is taken.

        Raises:
            CheckpointError: when there are checkpoints and none of them is whole.
        """
        damaged = list[str]()
        for step in reversed(self.steps()):
            try:
                checkpoint = Checkpoint(self.folder / folder_name(step))
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            for line in damaged:
                log.warning("%s (taken instead: step %d)", line, checkpoint.step)
            return checkpoint
        if damaged:
            raise CheckpointError(f"{self.folder}: expected a whole checkpoint, got "
                                  f"{len(damaged)} that cannot be used; start the run anew\n  "
                                  + "\n  ".join(damaged))
        return None

    def steps(self) -> list[int]:
        """The steps of all checkpoints, damaged ones included, in rising order.

        Raises:
            CheckpointError: when the folder cannot be read.
        """
        if not self.folder.exists():
            return []
        try:
            return sorted(step for path in self.folder.iterdir()
                          if (step := step_of(path.name)) is not None)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: expected a folder of checkpoints, got {error}; "
                                  "check its permissions") from error

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: a run that continues from `step` replays them.

        Raises:
            CheckpointError: when they cannot be removed.
        """
        self.wait()
        later = [later for later in self.steps() if later > step]
        try:
            self._remove([self.folder / folder_name(later) for later in reversed(later)])
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: expected to remove the checkpoints of the steps {later} that step "
                f"{step} replays, got {error}; check the folder's permissions") from error

    def _try_write(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # noqa: B036  raised by wait(), in the thread that saves
            self._error = error

    def _write(self, step: int, state: State, facts: Mapping[str, Any], is_best: bool) -> None:
        """Make a checkpoint durable, then remove what is beyond `keep`."""
        final = self.folder / folder_name(step)
        writing = final.with_name(final.name + WRITING)
        try:
            make_durable_folder(self._files, self.folder)
            self._clean()
            if self._is_there(final):
                return
            write_checkpoint(self._files, writing, step, state, facts, is_best)
            self._files.rename(writing, final)
            sync_folder(self._files, self.folder)
        except OSError as error:
            self._try_to(self._clean)
            raise CheckpointError(self._failure(step, error)) from error
        self._try_to(lambda: self._remove_others(step))

    def _is_there(self, final: Path) -> bool:
        """True where the checkpoint is whole; a damaged one is moved out of the way."""
        if not (final.is_symlink() or final.exists()):
            return False
        try:
            Checkpoint(final)
        except CheckpointError as error:
            log.warning("%s (replaced)", error)
            self._remove([final])
            return False
        return True

    def _remove_others(self, saved: int) -> None:
        """All but the last `keep` up to the one just saved and the best go, oldest first.

        Later ones are damaged, or of a run that is now being replayed: they would take the place
        of whole ones.
        """
        steps = self.steps()
        paths = [self.folder / folder_name(step) for step in steps if step <= saved]
        best = next((path for path in reversed(paths) if is_best_checkpoint(path)), None)
        self._remove([self.folder / folder_name(step) for step in reversed(steps) if step > saved])
        self._remove([path for path in paths[:-self.keep] if path != best])

    def _remove(self, paths: list[Path]) -> None:
        """Each loses its name, durably, before it loses a file."""
        for path in paths:
            deleting = path.with_name(path.name + DELETING)
            if deleting.exists():
                remove_tree(self._files, deleting)
            self._files.rename(path, deleting)
            sync_folder(self._files, self.folder)
            remove_tree(self._files, deleting)

    def _clean(self) -> None:
        """Remove what a process that is gone left behind."""
        for path in sorted(self._leftovers()):
            remove_tree(self._files, path)

    def _leftovers(self) -> Iterator[Path]:
        for path in self.folder.iterdir():
            if path.suffix in (WRITING, DELETING) and step_of(path.stem) is not None:
                yield path

    def _try_to(self, tidy: Any) -> None:
        """Tidying that fails costs space alone, and is done again by the next save."""
        try:
            tidy()
        except (OSError, CheckpointError) as error:
            log.warning("%s: could not be tidied (%s); the next save tries again", self.folder,
                        error)

    def _failure(self, step: int, error: OSError) -> str:
        try:
            steps = self.steps()
        except CheckpointError:
            steps = []
        intact = f"intact: step {steps[-1]}" if steps else "there was none before"
        return (f"{self.folder}: expected to write the checkpoint of step {step}, got {error} "
                f"({intact}); free space or repair the folder's permissions, then continue the "
                "run, or set output_dir to another disk")
