"""Phases of an iteration: policy before critic, and what each needs in memory. Equal numbers."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.config import PPOConfig
from fastrl.engine import Engine
from fastrl.errors import ConfigError
from fastrl.memory.residents import PARKABLE
from fastrl.metrics import PhaseTimer, is_timing
from fastrl.parsing import parse_config
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.common import packed_forward
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_learners import minibatches
from fastrl.trainers.ppo_update import PPOBatch, mean_by_name

IN_TURNS: dict[str, dict[str, Any]] = {
    "ptx": {"ptx_coef": 0.5, "ema_decay": 0.9},
    "max_approx_kl": {"max_approx_kl": 1e-3, "learning_rate": 3e-3},
    "critic warmup": {"num_critic_warmup_iterations": 1, "num_iterations": 3},
}


def update_in_turns(trainer: PPOTrainer, batch: PPOBatch) -> dict[str, float]:
    """For each minibatch a step of the policy, then one of the critic."""
    done: list[dict[str, float]] = []
    num_steps = 0
    policy, critic, iteration = trainer.policy_learner, trainer.critic_learner, trainer.iteration
    order = minibatches(trainer.config, batch.rollout.batch_size, iteration)
    for number, rows in enumerate(order):
        metrics: dict[str, float] = {}
        if trainer._trains_policy:
            windows = policy.ptx_windows(len(rows))
            metrics, scale = policy.gradients(batch, rows, windows, number == 0, trainer.config)
            limit = trainer.config.max_approx_kl
            if limit is not None and metrics["kl/approx"] > limit:
                policy.optimizer.zero_grad()
                done.append({"kl/approx": metrics["kl/approx"]})
                break
            policy.num_ptx_windows += len(windows)
            metrics |= policy.step(scale, iteration)
        metrics |= critic.step(batch, rows, iteration)
        done.append(metrics)
        num_steps += 1
    return mean_by_name(done) | trainer.budget.metrics() | {
        "update/num_minibatches": float(num_steps)}


@pytest.mark.parametrize("variant", IN_TURNS)
def test_policy_first_then_critic_equals_steps_in_turns(
    task: SimpleNamespace, variant: str
) -> None:
    def run(in_turns: bool) -> tuple[list[dict[str, float]], list[Any]]:
        trainer = task.make_trainer(inputs={"ptx": task.PTX}, num_inner_epochs=3,
                                    **IN_TURNS[variant])
        if in_turns:
            def update(batch: PPOBatch, timer: PhaseTimer) -> dict[str, float]:
                return update_in_turns(trainer, batch)

            trainer._update = update  # type: ignore[method-assign]
        history = [{name: value for name, value in trainer.step().items()
                    if not is_timing(name)} for _ in range(3)]
        return history, [*task.weights_of(trainer.policy), *task.weights_of(trainer.critic),
                         *trainer.policy_learner.optimizer.state_dict().values(),
                         *trainer.critic_learner.optimizer.state_dict().values()]

    history, tensors = run(in_turns=False)
    expected_history, expected_tensors = run(in_turns=True)
    assert [list(row.items()) for row in history] == [list(row.items())
                                                      for row in expected_history]
    assert task.equal(tensors, expected_tensors)
    if variant == "max_approx_kl":  # the limit is passed within an iteration, not at its ends
        assert any(1 <= row["update/num_minibatches"] < 6 for row in history), history


def test_the_critic_learns_after_the_policy(task: SimpleNamespace) -> None:
    trainer = task.make_trainer()
    events = []
    for name in ("policy", "critic"):
        optimizer = getattr(trainer, f"{name}_learner").optimizer

        def step(*arguments: Any, name: str = name, call: Any = optimizer.step) -> None:
            events.append(name)
            call(*arguments)

        optimizer.step = step
    metrics = trainer.step()
    assert events == ["policy", "policy", "critic", "critic"]
    assert metrics["time/policy_update_s"] > 0 and metrics["time/critic_update_s"] > 0


PARKED: dict[str, dict[str, Any]] = {
    "average judged": {"ema_decay": 0.9, "ptx_coef": 0.5},
    "last judged": {"ema_decay": 0.9, "eval_with_ema": False, "optimizer_moments": "8bit"},
    "critic warmup, no average": {"num_critic_warmup_iterations": 1, "ema_decay": None},
    "stops at max_kl": {"max_kl": 0.3, "learning_rate": 3e-2, "num_iterations": 20, "kl_coef": 9.0},
    "approximate KL, nothing best": {"max_approx_kl": 1e-3, "learning_rate": 3e-3,
                                     "keep_best": False, "dtype": "bfloat16"},
}


def parked_trainer(task: SimpleNamespace, parking: str, **settings: Any) -> PPOTrainer:
    """A trainer with a reward model, held-out prompts and pretraining windows."""
    dtype = torch.bfloat16 if settings.get("dtype") == "bfloat16" else torch.float32
    policy = task.tiny_model().to(dtype)
    reward_model = task.tiny_critic(policy, seed=5)
    trainer: PPOTrainer = task.make_trainer(
        policy, critic=copy.deepcopy(reward_model), scorer=RewardModelScorer(reward_model),
        inputs={"ptx": task.PTX, "eval_ptx": task.PTX, "eval_prompts": task.PROMPTS},
        parking=parking, eval_steps=2, **settings)
    return trainer


@pytest.mark.parametrize("variant", PARKED)
def test_parking_changes_no_number(task: SimpleNamespace, variant: str) -> None:
    def run(parking: str) -> tuple[list[dict[str, float]], str, list[torch.Tensor], int]:
        trainer = parked_trainer(task, parking, **PARKED[variant])
        history: list[dict[str, float]] = []

        def update(step: int, metrics: dict[str, float]) -> None:
            history.append({name: value for name, value in metrics.items()
                            if not is_timing(name)})
            # Between iterations anyone may ask the policy, such as the answers to sample prompts.
            trainer.engine.generate([[2, 3]], trainer.config.sampling, seed=step)

        reason = trainer.train(SimpleNamespace(update=update))
        num_parked = len(trainer.residents.parked)
        trainer.residents.fetch_all()
        tensors = [*task.weights_of(trainer.policy), *task.weights_of(trainer.critic),
                   *task.weights_of(trainer.reference), *trainer.weights.averages(),
                   *trainer.policy_learner.optimizer.state_dict().values(),
                   *trainer.critic_learner.optimizer.state_dict().values()]
        return history, reason, tensors, num_parked

    history, reason, tensors, num_parked = run("on")
    expected_history, expected_reason, expected_tensors, none_parked = run("off")
    assert history == expected_history and reason == expected_reason
    assert task.equal(tensors, expected_tensors)
    assert num_parked >= 5 and none_parked == 0
    if variant == "stops at max_kl":
        assert "above max_kl" in reason


def test_each_phase_has_what_it_needs_and_nothing_else(task: SimpleNamespace) -> None:
    trainer = parked_trainer(task, "on", ema_decay=0.9)
    seen: list[tuple[str, set[str]]] = []
    phase = trainer.residents.phase

    def note(name: str, *parts: str) -> Any:
        context = phase(name, *parts)

        def noted() -> Any:
            with context:
                empty = {"swapped"} if not trainer.weights.swapped() else set()
                seen.append((name, set(PARKABLE - trainer.residents.parked - empty)))
                yield

        return contextmanager(noted)()

    trainer.residents.phase = note  # type: ignore[method-assign]
    trainer.evaluate()
    trainer.step()
    evaluation = [
        ("evaluation", {"policy", "ema"}), ("evaluation", {"policy"}),
        ("evaluation", {"reference"}), ("evaluation", {"reward_model"}),
        ("evaluation", {"policy"}), ("evaluation", {"policy", "swapped"})]
    assert seen == [
        *evaluation, *evaluation,
        ("rollout", {"policy"}), ("scoring", {"policy"}), ("scoring", {"reference"}),
        ("scoring", {"critic"}), ("scoring", {"reward_model"}),
        ("policy_update", {"policy", "policy_optimizer", "ema"}),
        ("critic_update", {"critic", "critic_optimizer"}), ("rollout", {"policy"})]


def test_a_parked_model_says_so(task: SimpleNamespace) -> None:
    trainer = parked_trainer(task, "on")
    trainer.step()
    example = [task.PTX[0].token_ids]
    assert trainer.residents.parked >= {"reference", "critic", "policy_optimizer"}
    with pytest.raises(ConfigError, match="engine: expected weights in memory, got parked ones"):
        Engine(trainer.reference)
    with trainer.residents.phase("critic_update"), \
            pytest.raises(ConfigError, match="engine: expected weights in memory"):
        trainer.engine.generate([[2, 3]], trainer.config.sampling, seed=0)
    with trainer.residents.phase("rollout"):
        trainer.engine.generate([[2, 3]], trainer.config.sampling, seed=0)
    with pytest.raises(ConfigError, match=r"ScalarModel: expected weights in memory, got parked "
                                          r"ones \(critic, which scoring, critic_update bring"):
        packed_forward(trainer.critic, example)
    with pytest.raises(ConfigError, match="AdamW: .* parked ones .policy_optimizer, which policy_"):
        trainer.policy_learner.optimizer.step(1e-3)
    states = torch.ones(1, trainer.policy.spec.hidden_size)
    reward_model = trainer.scorer.model
    for group, parts in (("critic", trainer.critic), ("reference", trainer.reference),
                         ("reward_model", reward_model)):
        for parameter in parts.parameters():
            with pytest.raises(ConfigError, match=f"{group}: expected it in memory"):
                parameter.sum()
    with pytest.raises(ConfigError, match="critic: .* outside of scoring, critic_update;"):
        trainer.critic.head(states)
    with pytest.raises(ConfigError, match="reference: .* outside of scoring, evaluation;"):
        states @ trainer.reference.lm_head.weight.T
    with trainer.residents.phase("scoring", "critic"):
        assert packed_forward(trainer.critic, example)[0].isfinite().all()


def test_auto_without_need_and_off_park_nothing(task: SimpleNamespace) -> None:
    for parking in ("auto", "off"):
        trainer = parked_trainer(task, parking)
        trainer.step()
        assert trainer.residents.parked == frozenset()
    with pytest.raises(ConfigError, match="parking"):
        parse_config(PPOConfig, {"parking": "sometimes"}, "recipe")


def test_auto_parks_what_the_plan_says_has_to(task: SimpleNamespace) -> None:
    """With less and less memory some wait on the host in the end; the numbers stay."""
    free = parked_trainer(task, "off")
    mib = free.memory.plan.peak_bytes / 2**20
    trainers = (parked_trainer(task, "auto", gpu_memory=f"{mib / 2**halvings:.6f}MiB")
                for halvings in range(1, 12))
    tight = next(trainer for trainer in trainers if trainer.memory.plan.parks)
    assert tight.residents.parks == tight.memory.plan.parks
    for trainer in (free, tight):
        trainer.step()
    assert tight.residents.parked
    with tight.residents.phase("rollout"):
        for own, other in zip(tight.policy.parameters(), free.policy.parameters(), strict=True):
            assert torch.equal(own, other)
