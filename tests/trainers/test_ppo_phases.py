"""The update learns from the policy's minibatches first, then from the critic's: equal numbers."""

from types import SimpleNamespace
from typing import Any

import pytest

from fastrl.metrics import PhaseTimer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_update import PPOBatch, backward_policy, mean_by_name

IN_TURNS: dict[str, dict[str, Any]] = {
    "ptx": {"ptx_coef": 0.5, "ema_decay": 0.9},
    "max_approx_kl": {"max_approx_kl": 1e-3, "learning_rate": 3e-3},
    "critic warmup": {"num_critic_warmup_iterations": 1, "num_iterations": 3},
}


def update_in_turns(trainer: PPOTrainer, batch: PPOBatch) -> dict[str, float]:
    """For each minibatch a step of the policy, then one of the critic."""
    done: list[dict[str, float]] = []
    num_steps = 0
    for number, rows in enumerate(trainer._minibatches(batch.rollout.batch_size)):
        metrics: dict[str, float] = {}
        if trainer._trains_policy:
            metrics = backward_policy(trainer.policy, batch, rows, trainer.config,
                                      measures_ratio=number == 0)
            limit = trainer.config.max_approx_kl
            if limit is not None and metrics["kl/approx"] > limit:
                trainer.policy_optimizer.zero_grad()
                done.append({"kl/approx": metrics["kl/approx"]})
                break
            metrics |= trainer._step_policy(rows, metrics)
        metrics |= trainer._step_critic(batch, rows)
        done.append(metrics)
        num_steps += 1
    return mean_by_name(done) | {"update/num_minibatches": float(num_steps)}


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
                    if not name.startswith(("time/", "throughput/"))} for _ in range(3)]
        return history, [*task.weights_of(trainer.policy), *task.weights_of(trainer.critic),
                         *trainer.policy_optimizer.state_dict().values(),
                         *trainer.critic_optimizer.state_dict().values()]

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
        optimizer = getattr(trainer, f"{name}_optimizer")

        def step(*arguments: Any, name: str = name, call: Any = optimizer.step) -> None:
            events.append(name)
            call(*arguments)

        optimizer.step = step
    metrics = trainer.step()
    assert events == ["policy", "policy", "critic", "critic"]
    assert metrics["time/policy_update_s"] > 0 and metrics["time/critic_update_s"] > 0
