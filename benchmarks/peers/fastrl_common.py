"""What fastrl's scripts of SFT and reward training share."""

import argparse
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import transformers
from common import Clock

import fastrl
from fastrl.trainers.common import epoch_permutation

Example = TypeVar("Example")


def settings(workload: dict[str, Any]) -> dict[str, Any]:
    """AdamW without decay at a constant rate, one epoch at most."""
    return {
        "batch_size": workload["batch_size"], "max_steps": workload["num_steps"],
        "learning_rate": workload["learning_rate"], "lr_schedule": "constant",
        "max_seq_tokens": workload["max_tokens"], "max_grad_norm": 1.0, "seed": workload["seed"],
        "device": "cpu", "dtype": "float32"}


def in_order(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples placed so that the first epoch's order gives them as they are here."""
    placed = list(examples)
    for example, place in zip(examples, epoch_permutation(len(examples), seed, 0), strict=True):
        placed[place] = example
    return placed


def train(trainer: Any, clock: Clock, loss_name: str, options: argparse.Namespace) -> None:
    """Every step, with its loss, into the file."""
    losses = []
    clock.start()
    for _ in range(trainer.num_steps):
        losses.append(trainer.step()[loss_name])
        clock.stop()
    clock.write(options.out, "fastrl", {
        "fastrl": fastrl.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__}, losses=losses)
