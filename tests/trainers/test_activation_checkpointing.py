"""`activation_checkpointing` changes no number of any trainer, only what lies in memory."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.config import DPOConfig, RewardConfig, SFTConfig
from fastrl.metrics import is_timing
from fastrl.models import scalar_from_causal
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison

RANKINGS = [Comparison((2, 3), ((4, 5), (6,), (7, 8, 9)), (0, 1, 2))] * 4


def run_sft(task: SimpleNamespace, checkpointing: bool) -> tuple[Any, list[Any]]:
    trainer = SFTTrainer(SFTConfig(
        activation_checkpointing=checkpointing, learning_rate=1e-2, batch_size=2, num_epochs=2,
        residual_dropout=0.3, select_by="last", max_tokens_per_microbatch=8, ptx_ratio=1.0),
        task.tiny_model(), task.PTX, ptx=task.PTX)
    return trainer, [trainer.model]


def run_reward(task: SimpleNamespace, checkpointing: bool) -> tuple[Any, list[Any]]:
    trainer = RewardTrainer(RewardConfig(
        activation_checkpointing=checkpointing, learning_rate=1e-2, batch_size=2),
        scalar_from_causal(task.tiny_model(), 1), RANKINGS)
    return trainer, [trainer.model]


def run_dpo(task: SimpleNamespace, checkpointing: bool) -> tuple[Any, list[Any]]:
    trainer = DPOTrainer(DPOConfig(
        activation_checkpointing=checkpointing, learning_rate=1e-2, batch_size=2),
        task.tiny_model(), RANKINGS)
    return trainer, [trainer.policy]


def run_ppo(task: SimpleNamespace, checkpointing: bool) -> tuple[Any, list[Any]]:
    trainer = task.make_trainer(
        activation_checkpointing=checkpointing, ptx_coef=0.5, learning_rate=1e-2,
        inputs={"ptx": task.PTX}, max_tokens_per_microbatch=20)
    return trainer, [trainer.policy, trainer.critic]


@pytest.mark.parametrize("run", [run_sft, run_reward, run_dpo, run_ppo])
def test_training_has_the_same_bits(
    task: SimpleNamespace, run: Callable[..., tuple[Any, list[Any]]]
) -> None:
    results = []
    for checkpointing in (False, True):
        trainer, models = run(task, checkpointing)
        calls = [0] * len(models)
        for number, model in enumerate(models):
            def count(*_: Any, number: int = number, calls: list[int] = calls) -> None:
                calls[number] += torch.is_grad_enabled()

            model.backbone.layers[0].register_forward_pre_hook(count)
        metrics = [trainer.step() for _ in range(2)]
        kept = [{name: value for name, value in row.items()
                 if not is_timing(name)} for row in metrics]
        results.append((kept, [w for m in models for w in task.weights_of(m)], calls))
    (metrics, weights, calls), (again, ours, more_calls) = results
    assert again == metrics and task.equal(weights, ours)
    assert all(calls) and more_calls == [2 * count for count in calls]


def test_log_probs_stay_those_of_the_rollout(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(activation_checkpointing=True, learning_rate=1e-2)
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["ratio/first_minibatch_max_error"] < 1e-4
        assert metrics["logprob/gap_max"] < 1e-4
