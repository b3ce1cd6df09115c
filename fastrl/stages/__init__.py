"""The stages of a recipe: `run_stage(kind, config, console=...)` runs one of them."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastrl.checkpoints import Checkpoint
from fastrl.config import to_dict
from fastrl.console import Console
from fastrl.errors import ConfigError, DataError, ModelError
from fastrl.lineage import make_lineage
from fastrl.metrics import RunFolder
from fastrl.recipe import local_paths
from fastrl.runs import StageRun
from fastrl.stages.best_of_n import best_of_n
from fastrl.stages.evaluate import evaluate
from fastrl.stages.sampling import prompts, rank
from fastrl.stages.training import dpo, ppo, pretrain, reward, select, sft
from fastrl.stages.world import world
from fastrl.trainers.common import resolve_device
from fastrl.yaml_file import unknown_key

__all__ = ["run_stage", "stage_lineage"]

_STAGES: dict[str, Callable[..., None]] = {
    "world": world,
    "pretrain": pretrain,
    "sft": sft,
    "prompts": prompts,
    "rank": rank,
    "reward": reward,
    "select": select,
    "ppo": ppo,
    "grpo": ppo,
    "rloo": ppo,
    "dpo": dpo,
    "best_of_n": best_of_n,
    "evaluate": evaluate,
}


def run_stage(kind: str, config: StageRun, *, console: Console, name: str | None = None,
              lineage: Mapping[str, Any] | None = None,
              checkpoint: Checkpoint | None = None) -> Path:
    """Run one stage from its settings to its finished folder.

    The stage's inputs are read and checked first; nothing is written when they are wrong.

    Args:
        kind: A key of `fastrl.runs.RUN_TYPES`.
        config: The settings of that kind, with paths as they are on this disk.
        console: Where the header, progress and tables are shown.
        name: What the header says; the kind unless told.
        lineage: See fastrl.lineage; made from config and inputs unless told.
        checkpoint: Continue the run in the folder from here, see `fastrl.continuation`.
    Returns:
        The folder, `config.output_dir`.
    Raises:
        ConfigError: settings that do not fit together, or an output folder that holds something.
        DataError: a file is missing or a row of it is broken.
        ModelError: a model folder cannot be used.
    """
    if kind not in _STAGES:
        raise ConfigError(unknown_key(kind, _STAGES, "stage kind"))
    console.stage(name or kind, config.output_dir)
    if lineage is None:
        lineage = stage_lineage(kind, config)
    make_folder = partial(RunFolder, config.output_dir, config, stage=kind,
                          report_to=getattr(config, "report_to", ()),
                          device=resolve_device(getattr(config, "device", "cpu")), lineage=lineage,
                          checkpoint=checkpoint)
    opened: list[RunFolder] = []

    def open_folder() -> RunFolder:
        opened.append(make_folder())
        return opened[-1]

    try:
        _STAGES[kind](config, open_folder, console)
    except (ConfigError, DataError, ModelError):
        # What a trainer refuses is known only now; the corrected run may have the same folder.
        for folder in opened:
            folder.remove_if_unused()
        raise
    return Path(config.output_dir)


def stage_lineage(kind: str, config: StageRun) -> dict[str, Any]:
    """The lineage of a stage that is no part of a recipe: inputs go by their paths.

    Raises:
        DataError: when an input does not exist.
    """
    return make_lineage(kind, to_dict(config),
                        {path: Path(path) for _, path in local_paths(config)})
