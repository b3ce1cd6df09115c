"""All that a PPO run is between two iterations: what a checkpoint keeps of it, and gets back.

Everything random is a function of the seed and a counter, so that counters are its whole state.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.checkpoints import State
from fastrl.models.lora import trained_parameters
from fastrl.out_of_memory import PassBudget
from fastrl.rewards import Scorer
from fastrl.rewards.scorers import RewardModelScorer, WeightedScorer
from fastrl.trainers.ppo_trunks import critic_weights

if TYPE_CHECKING:
    from fastrl.trainers.ppo import PPOTrainer

VALUES = ("iteration", "num_recomputed", "score_std", "stop_reason", "kl", "num_ptx_windows",
          "max_tokens", "skipped")
"""Names of the trainer's own values; those of alarms, best weights and watch are beside them."""


def trainer_state(trainer: "PPOTrainer") -> State:
    """The state of a trainer between two iterations.

    Tensors are those of the trainer, or copies on the host where a phase parks some: what the
    policy's and the critic's steps need does not have to be in the device's memory together.
    """
    watch = trainer.evaluation.watch
    parts = [State(values=_values(trainer)), trainer.alarms.state().under("alarms"),
             trainer.weights.best_state().under("best")]
    if watch is not None:
        parts.append(watch.state().under("watch"))
    for phase, tensors in _tensors(trainer).items():
        with trainer.residents.phase(phase):
            part = State(dict(tensors))
            parts.append(part.copied() if trainer.residents.parks else part)
    return State.join(*parts)


def load_trainer_state(trainer: "PPOTrainer", state: State) -> None:
    """Put a state into a trainer of the same models, settings and data.

    Nothing is changed where the trainer's own tensors or values do not fit.

    Raises:
        CheckpointError: when names are missing or unknown, or a shape or dtype differs.
    """
    watch, groups = trainer.evaluation.watch, _tensors(trainer)
    others = ("alarms.", "best.", *(() if watch is None else ("watch.",)))
    own = State({k: v for k, v in state.tensors.items() if not k.startswith(others)},
                {k: v for k, v in state.values.items() if not k.startswith(others)})
    values = own.copy_to("PPO", {  # checks alone: what is on "meta" has no content
        name: torch.empty_like(tensor, device="meta")
        for group in groups.values() for name, tensor in group.items()}, VALUES)
    if watch is not None:
        watch.load_state(state.part("watch"), trainer.policy.lm_head.weight.device)
    trainer.alarms.load_state(state.part("alarms"))
    trainer.weights.load_best_state(state.part("best"))
    for phase, group in groups.items():
        with trainer.residents.phase(phase):
            State({name: state.tensors[name] for name in group}).copy_to("PPO", group)
    _load_values(trainer, values)
    with trainer.residents.phase("rollout"):
        trainer.engine.weights_changed()


def _tensors(trainer: "PPOTrainer") -> dict[str, dict[str, Tensor]]:
    """Phase -> the tensors in it that training changes, by name."""
    weights, learner = trainer.weights, trainer.policy_learner
    groups = {"policy_update": {
        **_named("policy", trainer.policy, trained_parameters(trainer.policy)),
        **_under("policy_optimizer", learner.optimizer.state_dict()),
        **_under("ema", {} if weights.ema is None else weights.ema.state_dict())}}
    if trainer.critic_learner is not None:
        assert trainer.critic is not None
        groups["critic_update"] = {
            **_named("critic", trainer.critic, critic_weights(trainer.config, trainer.critic)),
            **_under("critic_optimizer", trainer.critic_learner.optimizer.state_dict())}
    return groups


def _named(name: str, model: nn.Module, trained: Iterable[Tensor]) -> dict[str, Tensor]:
    """The trained weights of a model; tied ones once."""
    chosen = {id(weight) for weight in trained}
    return _under(name, {key: weight for key, weight in model.named_parameters()
                         if id(weight) in chosen})


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def _values(trainer: "PPOTrainer") -> dict[str, Any]:
    return {
        "iteration": trainer.iteration,
        "num_recomputed": trainer.num_recomputed,
        "score_std": trainer.score_std,
        "stop_reason": trainer.stop_reason,
        "kl": dict(trainer.kl_controller.state_dict()),
        "num_ptx_windows": trainer.policy_learner.num_ptx_windows,
        "skipped": [[guard.num_skipped, guard.num_in_a_row] for guard in trainer.guards],
        # Where memory ended once, passes stay smaller: sums round otherwise in others.
        "max_tokens": [trainer.budget.max_tokens, *(p.max_tokens for p in _passes(trainer))],
    }


def _load_values(trainer: "PPOTrainer", values: Mapping[str, Any]) -> None:
    trainer.iteration = values["iteration"]
    trainer.num_recomputed = values["num_recomputed"]
    trainer.score_std = values["score_std"]
    trainer.stop_reason = values["stop_reason"]
    trainer.kl_controller.load_state_dict(values["kl"])
    trainer.policy_learner.num_ptx_windows = values["num_ptx_windows"]
    for guard, counts in zip(trainer.guards, values["skipped"], strict=True):
        guard.num_skipped, guard.num_in_a_row = counts
    trainer.budget.max_tokens, *rest = values["max_tokens"]
    for passes, max_tokens in zip(_passes(trainer), rest, strict=True):
        passes.max_tokens = max_tokens


def _passes(trainer: "PPOTrainer") -> list[PassBudget]:
    """The budgets of all passes that score."""
    watch = trainer.evaluation.watch
    scorers: list[Scorer | None] = [trainer.scorer, None if watch is None else watch.gold]
    inner = [one for scorer in scorers for one in (
        [term.scorer for term in scorer.terms] if isinstance(scorer, WeightedScorer)
        else [scorer])]
    return [trainer.passes, *(one.passes for one in inner if isinstance(one, RewardModelScorer))]
