"""Looks through the inputs of a stage before any stage runs: a broken row costs seconds, not hours.

Rows are read by the loaders that the stage itself will use, with a tokenizer that splits at white
space, since the stage's own tokenizer may be the output of an earlier stage. Limits on length are
the stage's business and not looked at here.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastrl.data import (
    TextEncoder,
    load_comparisons,
    load_demonstrations,
    load_encoder,
    load_prompts,
    read_rows,
    word_tokenizer,
)
from fastrl.labelers import find_labeler
from fastrl.models.folder import WeightFiles, model_folder, read_raw_config
from fastrl.stages.rewards import check_rewards

_UNLIMITED = 1 << 62

Reader = Callable[[str], object]


def check_path(kind: str, field: str, path: str) -> None:
    """Read one input of a stage.

    Args:
        kind: Stage kind.
        field: The setting that names the input.
        path: Where it is; it exists.
    Raises:
        DataError: a data file is broken; names file, line and field.
        ModelError: a model folder is incomplete.
    """
    if field in ("data", "eval_data"):
        _DATA_READERS[kind](path)
    elif field == "reward_function":
        return  # read by check_names, which knows the function too
    elif field in _READERS:
        _READERS[field](path)
    else:
        _check_model(path)


def check_names(config: object) -> None:
    """Raise ConfigError when a setting names something that fastrl does not have."""
    labeler = getattr(config, "labeler", None)
    if labeler is not None:
        find_labeler(labeler)
    check_rewards(config)


def _check_text(path: str) -> None:
    for _ in read_rows(path):
        pass


def _check_model(path: str) -> None:
    folder = model_folder(path)
    read_raw_config(folder)
    WeightFiles(folder)


@functools.cache
def _encoder() -> TextEncoder:
    """A tokenizer that reads any text in no time."""
    with tempfile.TemporaryDirectory() as folder:
        return word_tokenizer([], Path(folder))


def _check_demonstrations(path: str) -> None:
    load_demonstrations(path, _encoder(), _UNLIMITED)


def _check_comparisons(path: str) -> None:
    load_comparisons(path, _encoder(), _UNLIMITED)


def _check_prompts(path: str) -> None:
    load_prompts(path, _encoder(), _UNLIMITED)


_DATA_READERS: dict[str, Reader] = {
    "pretrain": _check_text,
    "sft": _check_demonstrations,
    "prompts": _check_prompts,
    "reward": _check_comparisons,
    "dpo": _check_comparisons,
}
_READERS: dict[str, Reader] = {
    "tokenizer_name_or_path": load_encoder,
    "tokenizer_data": _check_text,
    "ptx_data": _check_text,
    "eval_ptx_data": _check_text,
    "text": _check_text,
    "demonstrations": _check_demonstrations,
    "prompts": _check_prompts,
    "heldout_prompts": _check_prompts,
    "eval_prompts": _check_prompts,
    "sample_prompts": _check_prompts,
}
