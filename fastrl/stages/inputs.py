"""Names into objects: what every stage loads before it opens its folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from fastrl.config import EngineConfig
from fastrl.console import Console
from fastrl.data import (
    DataReport,
    TextEncoder,
    load_comparisons,
    load_prompts,
    load_text_windows,
    read_rows,
)
from fastrl.exactness import set_workspaces
from fastrl.metrics import RunFolder
from fastrl.models import CausalLM, ScalarModel, check_tokenizer
from fastrl.models.weights import load_causal_lm, load_scalar_model
from fastrl.trainers.common import resolve_device, resolve_dtype
from fastrl.types import Comparison, Prompt, TokenExample

OpenFolder = Callable[[], RunFolder]
"""Makes the folder of a run: called when everything that can be wrong with the inputs is known."""

_TEXT_FIELDS = ("text", "prompt", "completion", "chosen", "rejected", "content")


class Placement(Protocol):
    """The settings that say where a model lives."""

    @property
    def device(self) -> str:
        """auto, cpu, cuda or cuda:N."""

    @property
    def dtype(self) -> str:
        """auto or the name of a dtype."""


def placement(run: Placement) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that a stage asks for; nothing is on a GPU yet."""
    device = resolve_device(run.device)
    engine = getattr(run, "engine", None)  # only stages that generate have one
    if isinstance(engine, EngineConfig) and engine.exact:
        set_workspaces(device.type)
    return device, resolve_dtype(run.dtype, device)


def placement_names(run: Placement) -> tuple[str, str]:
    """Dtype and device by name, as the loaders take them."""
    device, dtype = placement(run)
    return str(dtype).removeprefix("torch."), str(device)


def load_policy(path: str, run: Placement, encoder: TextEncoder) -> CausalLM:
    """A language model that reads the encoder's tokens and stops at its end tokens.

    Chat checkpoints often name their end-of-turn token in the tokenizer only; responses end there.

    Raises:
        ModelError: it cannot be loaded, or the tokenizer has ids that the model has not.
    """
    model = load_causal_lm(path, *placement_names(run))
    check_tokenizer(model.spec, encoder.max_token_id + 1)
    stops = dict.fromkeys((*model.spec.eos_token_ids, *encoder.eos_token_ids))
    model.spec = replace(model.spec, eos_token_ids=tuple(stops))
    return model


def load_reward_model(path: str, run: Placement, encoder: TextEncoder) -> ScalarModel:
    """A reward model that reads the encoder's tokens; raises as `load_policy`."""
    model = load_scalar_model(path, *placement_names(run))
    check_tokenizer(model.spec, encoder.max_token_id + 1)
    return model


def load_prompt_files(paths: Sequence[str], encoder: TextEncoder, max_tokens: int,
                      console: Console) -> list[Prompt]:
    """The prompts of several files; what was dropped is shown."""
    prompts, report = load_prompts(paths, encoder, max_tokens)
    show_report(report, console)
    return prompts


def load_ranking_files(paths: Sequence[str], encoder: TextEncoder, max_tokens: int,
                       console: Console) -> list[Comparison]:
    """The rankings of several files; rows without a source get the name of their file."""
    comparisons: list[Comparison] = []
    for path in paths:
        rows, report = load_comparisons(path, encoder, max_tokens)
        show_report(report, console)
        name = Path(path).name.removesuffix(".gz")
        comparisons += [replace(row, source=row.source or name) for row in rows]
    return comparisons


def load_text_files(paths: Sequence[str], encoder: TextEncoder, window: int) -> list[TokenExample]:
    """The windows of several text files; none without a file."""
    return load_text_windows(paths, encoder, window) if paths else []


def read_texts(paths: Sequence[str]) -> list[str]:
    """Every text in the fields that hold language, of text files and of row files."""
    return [text for path in paths for row in read_rows(path) for text in _texts(row.value)]


def _texts(value: object) -> Iterator[str]:
    """The texts of a row and of what is nested in it."""
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(item, str):
                yield from _texts(item)
            elif name in _TEXT_FIELDS:
                yield item


def show_report(report: DataReport, console: Console) -> None:
    """What came out of data files; a warning where rows were lost."""
    lost = report.dropped_too_long + report.without_comparison
    (console.warning if lost else console.print)(report.summary())
