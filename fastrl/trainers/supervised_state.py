"""What SFT, reward and DPO trainers are between two steps: what a checkpoint keeps, and gives back.

Data order, schedule and dropout are functions of the seed and a counter, so that counters are their
whole state.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.checkpoints import State
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.lora import trained_parameters
from fastrl.optim import AdamW
from fastrl.out_of_memory import PassBudget
from fastrl.trainers.alarm_log import AlarmLog
from fastrl.trainers.budget import TokenBudget


class Supervised(Protocol):
    """What those trainers have in common."""

    optimizer: AdamW
    budget: TokenBudget[Any]
    passes: PassBudget
    alarms: AlarmLog
    num_finished: int


def supervised_state(trainer: Supervised, model: CausalLM | ScalarModel, extra: State) -> State:
    """The state of a trainer; its tensors are not copied.

    Args:
        trainer: Between two steps.
        model: What it trains.
        extra: What this kind of trainer has beside.
    """
    values = {"num_finished": trainer.num_finished,
              # Where memory ended once, passes stay smaller: sums round otherwise in others.
              "max_tokens": [trainer.budget.max_tokens, trainer.passes.max_tokens]}
    return State.join(State(_tensors(trainer, model), values), extra,
                      trainer.alarms.state().under("alarms"),
                      trainer.budget.guard.state().under("skipped"))


def load_supervised_state(
    owner: str, trainer: Supervised, model: CausalLM | ScalarModel, extra: State, state: State
) -> Mapping[str, Any]:
    """Put a state into a trainer of the same model, settings and data.

    Args:
        owner: The kind of trainer, for errors.
        trainer: Fresh, or between two steps.
        model: What it trains.
        extra: The tensors that this kind of trainer has beside, which are filled, and its values.
        state: From `supervised_state`.
    Returns:
        The values of the state, those of `extra` among them.
    Raises:
        CheckpointError: when names are missing or unknown, or a shape or dtype differs; nothing has
            changed then.
    """
    values = supervised_state(trainer, model, extra).values
    found = state.copy_to(owner, {**_tensors(trainer, model), **extra.tensors}, values)
    trainer.alarms.load_state(state.part("alarms"))
    trainer.budget.guard.load_state(state.part("skipped"))
    trainer.num_finished = found["num_finished"]
    trainer.budget.max_tokens, trainer.passes.max_tokens = found["max_tokens"]
    return found


def _tensors(trainer: Supervised, model: CausalLM | ScalarModel) -> dict[str, Tensor]:
    """Every tensor that a step changes; tied weights once."""
    trained = {id(weight) for weight in trained_parameters(model)}
    weights = {f"model.{name}": weight for name, weight in model.named_parameters()
               if id(weight) in trained}
    optimizer = {f"optimizer.{name}": tensor
                 for name, tensor in trainer.optimizer.state_dict().items()}
    return weights | optimizer


def floats(values: list[float]) -> Tensor:
    """Numbers as a tensor that keeps every bit."""
    return torch.tensor(values, dtype=torch.float64)
