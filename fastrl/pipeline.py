"""The stages of a recipe in order: checked first, skipped when nothing changed, traceable later.

A stage's folder is `<output_dir>/<stage name>`. A stage that was stopped goes on from its newest
checkpoint when its settings and inputs are unchanged. No run is ever deleted: a folder that is in
the way is renamed to `<stage name>.interrupted-1` (a run that did not end and cannot go on) or
`.old-1` (asked for with `from_stage`), counting up.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrl.checkpoints import Checkpoint
from fastrl.config import to_dict
from fastrl.console import Console
from fastrl.continuation import find_checkpoint
from fastrl.errors import CheckpointError, ConfigError, DataError
from fastrl.lineage import lineage_changes, make_lineage
from fastrl.metrics import write_atomic
from fastrl.recipe import Recipe, Stage, load_recipe, local_paths, resolve_path, resolve_stage
from fastrl.report import write_report
from fastrl.stages import run_stage
from fastrl.stages.check import check_names, check_path
from fastrl.yaml_file import unknown_key

__all__ = ["run_recipe", "run_stage"]


LOCK = ".lock"
"""File of an output folder that a running recipe holds locked."""

def run_recipe(
    recipe: Path | str,
    *,
    data_root: Path | str,
    output_dir: Path | str,
    overrides: Sequence[str] = (),
    short: bool = False,
    from_stage: str | None = None,
    from_scratch: bool = False,
    console: Console,
) -> Path:
    """Run the stages of a recipe that are not finished yet, then write the report.

    Everything that can be wrong is looked for before the first stage starts: settings, files that
    should be there, rows of data files, and finished stages that no longer fit the recipe.

    Args:
        recipe: YAML file, see fastrl.recipe.
        data_root: Folder in which the recipe's relative paths are looked up.
        output_dir: Folder of the run; one folder per stage, and `report.html`.
        overrides: `stage.field=value`, applied last.
        short: Run the recipe's short form.
        from_stage: Run this stage and all later ones again; their folders are renamed.
        from_scratch: Run a stage that was stopped from its beginning; its folder is renamed.
        console: Where headers, progress and tables are shown.
    Returns:
        The report.
    Raises:
        ConfigError: the recipe is wrong, or a finished stage does not fit it any more.
        DataError: a file is missing, or a row of it is broken.
    """
    plan = load_recipe(recipe, overrides, short=short)
    output_dir, data_root = Path(output_dir), Path(data_root)
    _check_owner(plan, output_dir)
    again = _stages_from(plan, from_stage)
    for stage in plan.stages:
        _check_presence(plan, stage, data_root)
    pending = [stage for stage in plan.stages
               if stage in again or not _is_finished(stage, output_dir, data_root)]
    _check_contents(pending, data_root)
    output_dir.mkdir(parents=True, exist_ok=True)
    with _only_run(output_dir):
        for stage in again:
            _move_aside(output_dir / stage.name, "old")
        write_atomic(output_dir / "recipe.json", json.dumps({"name": plan.name}) + "\n")
        for stage in plan.stages:
            _run_or_skip(stage, output_dir, data_root, console, from_scratch=from_scratch)
        return write_report(output_dir)


@contextmanager
def _only_run(output_dir: Path) -> Iterator[None]:
    """Hold the folder's lock: a second run would take the first one's live stage for interrupted.

    The system gives the lock back when the process ends, however it ends.
    """
    if sys.platform == "win32":  # has no fcntl
        yield
        return
    import fcntl

    with (output_dir / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir: expected a folder that no other run is using, but another process "
                f"is running a recipe in {output_dir}; wait for it or choose another output_dir"
            ) from None
        yield


def _run_or_skip(stage: Stage, output_dir: Path, data_root: Path, console: Console, *,
                 from_scratch: bool) -> None:
    folder = output_dir / stage.name
    if _is_finished(stage, output_dir, data_root):
        console.stage(stage.name, "finished before; settings and inputs are unchanged, skipped")
        return
    lineage, checkpoint = _lineage(stage, output_dir, data_root), None
    if (folder / "run.json").exists():
        checkpoint = _checkpoint_or_move(folder, lineage, console, from_scratch=from_scratch)
    run_stage(stage.kind, resolve_stage(stage, output_dir, data_root), console=console,
              name=stage.name, lineage=lineage, checkpoint=checkpoint)


def _checkpoint_or_move(folder: Path, lineage: Mapping[str, Any], console: Console, *,
                        from_scratch: bool) -> Checkpoint | None:
    """Where an unfinished run goes on; None when it was moved aside, which is said with why."""
    try:
        if from_scratch:
            raise CheckpointError("--from_scratch was given")
        checkpoint = find_checkpoint(folder, lineage)
    except CheckpointError as error:
        moved = _move_aside(folder, "interrupted")
        console.print(f"{folder.name}: an unfinished run was moved to {moved.name}: {error}")
        return None
    console.print(f"{folder.name}: continues after step {checkpoint.step}")
    return checkpoint


def _lineage(stage: Stage, output_dir: Path, data_root: Path) -> dict[str, Any]:
    """The lineage that the stage has if it runs now."""
    inputs = {reference: resolve_path(reference, output_dir, data_root)
              for reference in stage.references}
    return make_lineage(stage.kind, to_dict(stage.config), inputs)


def _is_finished(stage: Stage, output_dir: Path, data_root: Path) -> bool:
    """True when the stage is finished and unchanged; ConfigError when finished and changed.

    A finished stage that misses an output of an earlier stage is judged when that is there again.
    """
    folder = output_dir / stage.name
    has_inputs = all(resolve_path(reference, output_dir, data_root).exists()
                     for reference in stage.references)
    if not (folder / "finished.json").exists() or not has_inputs:
        return False
    before: Mapping[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))["lineage"]
    changes = lineage_changes(before, _lineage(stage, output_dir, data_root))
    if changes:
        listed = "; ".join(changes[:8]) + ("; ..." if len(changes) > 8 else "")
        raise ConfigError(
            f"stage {stage.name!r} is finished in {folder}, but since then changed: {listed}. "
            f"Choose another output_dir, or run it and all later stages again with "
            f"--from_stage {stage.name} (their folders are renamed, nothing is deleted)")
    return True


def _check_presence(plan: Recipe, stage: Stage, data_root: Path) -> None:
    """Raise when a name or file of a stage does not exist; outputs of stages come later."""
    for field, reference in local_paths(stage.config):
        path = data_root / reference
        if not reference.startswith("@") and not path.exists():
            raise DataError(f"{plan.where}, stage {stage.name!r}: {field}: expected a file or "
                            f"folder, found nothing at {path}; check the path and --data_root")
    # The stage's own folder is not looked at here: names of functions are, in files that are there.
    check_names(resolve_stage(stage, Path(), data_root))


def _check_contents(stages: Sequence[Stage], data_root: Path) -> None:
    """Raise when a file of the data root cannot be read; each is looked at once per use."""
    uses = {(stage.kind, field, reference) for stage in stages
            for field, reference in local_paths(stage.config) if not reference.startswith("@")}
    for kind, field, reference in sorted(uses):
        check_path(kind, field, str(data_root / reference))


def _stages_from(plan: Recipe, from_stage: str | None) -> tuple[Stage, ...]:
    """The stage of that name and all later ones; none when no name is given."""
    names = [stage.name for stage in plan.stages]
    if from_stage is None:
        return ()
    if from_stage not in names:
        raise ConfigError(unknown_key(from_stage, names, f"{plan.where}: --from_stage"))
    return plan.stages[names.index(from_stage):]


def _check_owner(plan: Recipe, output_dir: Path) -> None:
    """Raise ConfigError when the output folder holds something else than this recipe's run."""
    record = output_dir / "recipe.json"
    if record.exists():
        name = json.loads(record.read_text("utf-8"))["name"]
        if name != plan.name:
            raise ConfigError(f"output_dir: {output_dir} holds a run of recipe {name!r}, expected "
                              f"{plan.name!r}; choose another output_dir")
    elif output_dir.exists() and (not output_dir.is_dir()
                                  or any(p.name != LOCK for p in output_dir.iterdir())):
        raise ConfigError(f"output_dir: expected a new or empty folder, or one of an earlier run "
                          f"of this recipe, got {output_dir}; choose another output_dir")


def _move_aside(folder: Path, why: str) -> Path:
    """Rename a folder to the first free `<name>.<why>-N`; return the new path."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    if folder.exists():
        folder.rename(target)
    return target
