"""Continuing a run that was stopped: the checkpoint that fits, and the run's files as they were."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrl.checkpoints import Checkpoint, CheckpointStore
from fastrl.errors import CheckpointError, ConfigError
from fastrl.lineage import lineage_changes

FOLDER = "checkpoints"
"""Where a run's checkpoints are in its folder."""
_MAX_CHANGES = 8
_REMEDY = "start the run anew in another output_dir"


def find_checkpoint(run: Path, lineage: Mapping[str, Any]) -> Checkpoint:
    """The newest whole checkpoint of an unfinished run whose settings and inputs are these.

    Args:
        run: The run's folder.
        lineage: What the run would have if it began now, see fastrl.lineage.
    Raises:
        CheckpointError: when there is none that can be continued; says why.
    """
    record = run / "run.json"
    if not record.is_file():
        raise CheckpointError(f"{run}: expected the folder of a run, found no run.json there; "
                              "check the path")
    if (run / "finished.json").exists():
        raise CheckpointError(f"{run}: expected a run that was stopped, got one that is finished; "
                              "its model is in the folder")
    try:
        before = json.loads(record.read_text("utf-8"))["lineage"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{record}: expected the record of a run, got {error!r}; "
                              f"{_REMEDY}") from error
    changes = lineage_changes(before, lineage)
    if changes:
        more = "; ..." if len(changes) > _MAX_CHANGES else ""
        raise CheckpointError(f"{run}: expected the settings and inputs of the run, but since then "
                              f"changed: {'; '.join(changes[:_MAX_CHANGES])}{more}; change them "
                              f"back, or {_REMEDY}")
    checkpoint = CheckpointStore(run / FOLDER).newest()
    if checkpoint is None:
        raise CheckpointError(f"{run}: expected a checkpoint, found none; {_REMEDY}")
    for name, size in checkpoint.facts["files"].items():
        found = (run / name).stat().st_size if (run / name).is_file() else 0
        if found < size:
            raise CheckpointError(f"{run / name}: expected at least the {size} bytes that it had "
                                  f"at step {checkpoint.step}, got {found}; {_REMEDY}")
    return checkpoint


def file_sizes(run: Path) -> dict[str, int]:
    """Name -> bytes of the files that a run appends to; what they hold is on the disk on return."""
    sizes = {}
    for path in sorted(run.glob("*.jsonl")):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            sizes[path.name] = file.seek(0, os.SEEK_END)
    return sizes


def cut_files(run: Path, sizes: Mapping[str, int]) -> None:
    """Cut the files that a run appends to back to these sizes; the others were empty then."""
    for path in sorted(run.glob("*.jsonl")):
        if path.name in sizes:
            os.truncate(path, sizes[path.name])
        else:
            path.unlink()


def refuse_used_folder(path: Path) -> None:
    """Raise ConfigError unless `path` is free: absent, or an empty folder."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"output_dir: expected a folder, got the file {path}; choose another "
                          "output_dir")
    entries = sorted(entry.name for entry in path.iterdir())
    if not entries:
        return
    remedy = "choose another output_dir, or delete the folder"
    if "finished.json" in entries:
        held = "a finished run"
    elif "run.json" in entries:
        held = "a run that did not finish"
        if FOLDER in entries:
            remedy = f"continue it with --resume {path}, {remedy}"
    else:
        held, remedy = f"other files ({', '.join(entries[:3])})", "choose another output_dir"
    raise ConfigError(f"output_dir: expected a new or empty folder, got {path}, which holds {held};"
                      f" {remedy}")
