"""`fastrl plan`: will a stage fit, before anything is loaded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.config import PPOConfig, RewardConfig, SFTConfig, TrainConfig, read_bytes
from fastrl.console import Console
from fastrl.errors import ConfigError
from fastrl.memory.measure import budget_bytes
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.report import COLUMNS, headline, phase_rows, resident_rows
from fastrl.memory.shapes import (
    NAMED,
    ModelShape,
    joined,
    shape_named,
    shape_of_config,
    shape_of_folder,
)
from fastrl.memory.stages import plan_dpo, plan_ppo, plan_reward, plan_sft
from fastrl.memory.training import Device
from fastrl.models.families import decoder_config
from fastrl.options import UNREAD
from fastrl.recipe import load_recipe
from fastrl.reward_settings import join_parts
from fastrl.runs import DPORun, PPORun, PretrainRun, RewardRun, SelectRun, SFTRun, StageRun
from fastrl.trainers.common import resolve_device, resolve_dtype

CARDS = ("24GB", "48GB", "80GB", "141GB")
_LEAST: dict[str, Any] = {"activation_checkpointing": True, "optimizer_moments": "8bit"}
TABLE_SETTINGS: Mapping[str, TrainConfig] = {
    "SFT": SFTConfig(**_LEAST),
    "reward model": RewardConfig(**_LEAST),
    "PPO": PPOConfig(**_LEAST, ema_decay=None, eval_with_ema=False),
    "SFT, LoRA": SFTConfig(**_LEAST, lora_rank=16),
    "reward model, LoRA": RewardConfig(**_LEAST, lora_rank=16),
    "PPO, LoRA": PPOConfig(**_LEAST, ema_decay=None, eval_with_ema=False, lora_rank=16,
                           reference="adapters_off"),
}
"""The settings of the table: those that take the least memory without changing what is learned,
with all weights trained and with LoRA."""


def plan_stage(kind: str, config: StageRun, shape: str | None, console: Console) -> bool:
    """Print the plan of one stage; True when it fits.

    Args:
        kind: pretrain, sft, reward, ppo or dpo.
        config: Its settings.
        shape: A name of `NAMED` that stands for every model folder; None reads the folders.
        console: Where the tables go.
    """
    def shape_of(path: str) -> ModelShape:
        if shape is None and path == UNREAD:
            raise ConfigError(f"fastrl plan {kind}: expected --model_name_or_path FOLDER or "
                              f"--shape NAME, got neither; names: {', '.join(NAMED)}")
        return shape_named(shape) if shape is not None else shape_of_folder(path)

    new = None
    if isinstance(config, PretrainRun):
        new = _new_shape(kind, config) if shape is None else shape_named(shape)
    plan = _plan(config, shape_of, new)
    show(kind, plan, console)
    return plan.fits


def plan_recipe(path: Path, data_root: Path, overrides: Sequence[str], gpu_memory: str | None,
                console: Console) -> bool:
    """Print the plan of each training stage of a recipe; True when all fit.

    Args:
        path: YAML file, see fastrl.recipe.
        data_root: Folder in which the recipe's relative paths are looked up.
        overrides: `stage.field=value`, applied last.
        gpu_memory: Takes the place of the stages' own; None leaves those.
        console: Where the tables go.
    """
    shapes: dict[str, ModelShape] = {}

    def shape_of(reference: str) -> ModelShape:
        if not reference.startswith("@"):
            return shape_of_folder(data_root / reference)
        return shapes[reference[1:].partition("/")[0]]

    fits = True
    for stage in load_recipe(path, overrides).stages:
        config = stage.config
        if isinstance(config, PretrainRun):
            shapes[stage.name] = _new_shape(stage.name, config)
        elif isinstance(config, SelectRun | SFTRun | RewardRun | PPORun | DPORun):
            shapes[stage.name] = shape_of(config.model_name_or_path)
        if isinstance(config, SFTRun | PretrainRun | RewardRun | PPORun | DPORun):
            if gpu_memory is not None:
                config = dataclasses.replace(config, gpu_memory=gpu_memory)
            plan = _plan(config, shape_of, shapes[stage.name])
            show(stage.name, plan, console)
            fits = fits and plan.fits
    return fits


def _plan(config: StageRun, shape_of: Callable[[str], ModelShape],
          new: ModelShape | None = None) -> MemoryPlan:
    """The plan of a stage whose models have the shapes that `shape_of` finds.

    Args:
        new: The shape of a model that the stage makes from nothing.
    """
    device = _device(config)
    if isinstance(config, PPORun):
        policy = shape_of(config.model_name_or_path)
        parts = join_parts(config.reward_model, config.reward_function, config.rewards)
        models = [shape_of(part.model) for part in parts.values() if part.model is not None]
        reference = config.reference_model
        critic = models[0] if models and config.critic_init == "reward" else None
        return plan_ppo(config, policy, device, critic=critic,
                        reward_model=joined(models) if models else None,
                        reference=None if reference is None else shape_of(reference),
                        has_reward_model=bool(models) or not parts)
    if isinstance(config, DPORun):
        second = config.reference_model
        return plan_dpo(config, shape_of(config.model_name_or_path), device,
                        reference=None if second is None else shape_of(second))
    if isinstance(config, RewardRun):
        return plan_reward(config, shape_of(config.model_name_or_path), device)
    if isinstance(config, SFTRun):
        return plan_sft(config, shape_of(config.model_name_or_path), device)
    assert isinstance(config, PretrainRun) and new is not None
    return plan_sft(config, new, device, longest=config.window_tokens)


def _device(config: StageRun) -> Device:
    """The card that `gpu_memory` describes, whether it is there or not, or this machine."""
    assert isinstance(config, TrainConfig)
    if config.gpu_memory is not None and config.device != "cpu":
        dtype = resolve_dtype(config.dtype, torch.device("cuda"))
        return Device("cuda", read_bytes(config.gpu_memory, "gpu_memory"), dtype)
    device = resolve_device(config.device)
    return Device(device.type, budget_bytes(config, device), resolve_dtype(config.dtype, device))


def _new_shape(name: str, run: PretrainRun) -> ModelShape:
    """The shape of a decoder that a stage trains from nothing."""
    return shape_of_config(name, decoder_config(
        run.family, vocab_size=run.vocab_size, hidden_size=run.hidden_size,
        num_layers=run.num_layers, num_heads=run.num_heads, num_kv_heads=run.num_kv_heads,
        intermediate_size=run.intermediate_size, max_positions=run.max_positions))


def show(title: str, plan: MemoryPlan, console: Console) -> None:
    """Print a plan: residents, phases, the verdict, and what to change."""
    console.table(f"{title}: residents", COLUMNS, resident_rows(plan))
    console.table(f"{title}: phases", ("phase", "bytes", "of which"), phase_rows(plan))
    for line in (f"{title}: {headline(plan)}", *(f"  {line}" for line in plan.advice)):
        console.result(line)


def largest_models(budget: str) -> dict[str, str]:
    """Stage -> the largest named model that a card trains, under `TABLE_SETTINGS`."""
    device = Device("cuda", read_bytes(budget, "gpu_memory"), torch.bfloat16)
    shapes = sorted((shape_named(name) for name in NAMED), key=lambda s: -sum(s.language_model))
    found: dict[str, str] = {}
    for stage, config in TABLE_SETTINGS.items():
        fitting = (shape.name for shape in shapes if _fits(config, shape, device))
        found[stage] = next(fitting, "none of them")
    return found


def _fits(config: TrainConfig, shape: ModelShape, device: Device) -> bool:
    if isinstance(config, SFTConfig):
        return plan_sft(config, shape, device).fits
    if isinstance(config, RewardConfig):
        return plan_reward(config, shape, device).fits
    assert isinstance(config, PPOConfig)
    return plan_ppo(config, shape, device).fits


def table() -> str:
    """Markdown: the largest named model per card and stage."""
    columns = {card: largest_models(card) for card in CARDS}
    lines = ["| | " + " | ".join(card.replace("GB", " GB") for card in CARDS) + " |",
             "|---" * (len(CARDS) + 1) + "|"]
    lines += [f"| {stage} | " + " | ".join(columns[card][stage] for card in CARDS) + " |"
              for stage in TABLE_SETTINGS]
    return "\n".join(lines)
