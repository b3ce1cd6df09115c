"""Moments of a model that learns, in every stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastrl.config import TrainConfig
from fastrl.memory import sizes
from fastrl.memory.plan import Moment
from fastrl.memory.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Device:
    """Where a stage runs, as far as a plan asks."""

    type: str
    """cuda or cpu."""
    budget_bytes: int
    """Memory for this process."""
    dtype: torch.dtype
    """Of the weights."""


def trained(
    name: str, numels: Sequence[int], learned: Sequence[int], config: TrainConfig,
    dtype: torch.dtype,
) -> dict[str, int]:
    """Bytes of a model that learns: its weights, and the optimiser of those that change."""
    return {name: sizes.weight_bytes(numels, dtype),
            f"{name}_optimizer": sizes.optimizer_bytes(learned, dtype, config.optimizer_moments)}


def training(
    phase: str, name: str, numels: Sequence[int], shape: ModelShape, config: TrainConfig,
    device: Device, tokens: int, loss: int, needs: tuple[str, ...] = (), has_dropout: bool = False,
) -> list[Moment]:
    """Backward through a model, then its optimiser step.

    Args:
        name: What the residents' names begin with.
        numels: Of the weights that change.
        tokens: Of a microbatch.
        loss: Bytes of what the head makes.
        needs: Residents that have to be on the device; none: the model and its optimiser.
    """
    dtype = device.dtype
    needs = needs or (name, f"{name}_optimizer")
    gradients = {f"{name}_gradients": sizes.weight_bytes(numels, dtype)}
    activations = sizes.activation_bytes(
        shape.decoder, dtype, tokens, device_type=device.type,
        is_checkpointed=config.activation_checkpointing, has_dropout=has_dropout)
    activations += sizes.adapter_bytes(shape.decoder, dtype, tokens, shape.adapter_width)
    scratch = sizes.scratch_bytes(numels, dtype, config.optimizer_moments, device_type=device.type)
    loss += shape.joined_head_bytes(dtype)
    return [Moment(phase, needs, gradients | {"activations": activations, "logits": loss}),
            Moment(phase, needs, gradients | {"scratch": scratch})]
