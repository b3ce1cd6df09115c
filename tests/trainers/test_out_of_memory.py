"""Allocations that fail in scoring and in the update: smaller passes, the same numbers."""

import copy
import dataclasses
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.config import DPOConfig, RewardConfig, SamplingConfig, SFTConfig
from fastrl.errors import DeviceMemoryError
from fastrl.memory.parking import ParkingPlace
from fastrl.metrics import PhaseTimer
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.models.scoring import (
    read_trunk,
    response_logprobs,
    response_scores,
    response_values,
)
from fastrl.optim import AdamW
from fastrl.out_of_memory import PassBudget
from fastrl.trainers.budget import TokenBudget
from fastrl.trainers.common import evaluate_token_loss
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison, TokenExample

FailingAllocations: Any = runpy.run_path(
    str(Path(__file__).parents[1] / "failing_allocations.py"))["FailingAllocations"]
EXAMPLES = [TokenExample(tuple(range(2, 5 + i)), (False, *[True] * (2 + i))) for i in range(4)]
RANKINGS = [Comparison((2, 3), ((4, 5, 1), (6, 1), (7, 8, 9, 1)), (0, 1, 2)),
            Comparison((5,), ((9, 1), (3, 4, 1)), (1, 0))]


def _ppo(task: SimpleNamespace, **settings: Any) -> tuple[Any, list[torch.nn.Module]]:
    trainer = task.make_trainer(
        inputs={"ptx": task.PTX}, ptx_coef=1.0, ptx_ratio=0.5, num_iterations=1,
        num_samples_per_prompt=2, max_tokens_per_microbatch=64, **settings)
    return trainer, [trainer.policy, trainer.critic]


def _sft(task: SimpleNamespace, **settings: Any) -> tuple[Any, list[torch.nn.Module]]:
    model = task.tiny_model()
    trainer = SFTTrainer(
        SFTConfig(**{"batch_size": 4, "max_tokens_per_microbatch": 64, "learning_rate": 1e-3,
                     "ptx_ratio": 0.5, "residual_dropout": 0.0, "select_by": "last", **settings}),
        model, EXAMPLES, ptx=task.PTX)
    return trainer, [model]


def _reward(task: SimpleNamespace) -> tuple[Any, list[torch.nn.Module]]:
    model = scalar_from_causal(task.tiny_model(), 0)
    config = RewardConfig(batch_size=2, max_tokens_per_microbatch=64, learning_rate=1e-3)
    return RewardTrainer(config, model, RANKINGS), [model]


def _dpo(task: SimpleNamespace) -> tuple[Any, list[torch.nn.Module]]:
    model = task.tiny_model()
    config = DPOConfig(batch_size=2, max_tokens_per_microbatch=64, learning_rate=1e-3)
    return DPOTrainer(config, model, RANKINGS), [model]


def _fail_in_updates(monkeypatch: pytest.MonkeyPatch, failing: Any) -> None:
    """Allocations fail inside attempts at a minibatch, and are counted there alone."""
    run = TokenBudget.run

    def watched(self: Any, attempt: Callable[[Any], Any], *arguments: Any) -> Any:
        def attempt_watched(config: Any) -> Any:
            with failing:
                return attempt(config)

        return run(self, attempt_watched, *arguments)

    monkeypatch.setattr(TokenBudget, "run", watched)


def _assert_close(models: Sequence[torch.nn.Module], before: Sequence[Sequence[Tensor]]) -> None:
    for model, weights in zip(models, before, strict=True):
        for new, old in zip(model.parameters(), weights, strict=True):
            assert float((new.detach() - old).norm()) <= 1e-5 * float(old.norm())


def _same_step(
    make: Callable[[SimpleNamespace], tuple[Any, list[torch.nn.Module]]], task: SimpleNamespace,
    num_points: int,
) -> None:
    """One allocation fails in a step of a new trainer, at `num_points` places in turn."""
    trainer, models = make(task)
    with FailingAllocations(lambda number: False) as counted:
        expected = trainer.step()
    weights = [task.weights_of(model) for model in models]
    stride = max(1, counted.count // num_points)
    for n in range(0, counted.count, stride):
        trainer, models = make(task)
        with FailingAllocations.at(n):
            metrics = trainer.step()
        _assert_close(models, weights)
        for name, value in expected.items():
            if name.partition("/")[0] not in ("time", "throughput", "memory"):
                assert math.isclose(metrics[name], value, rel_tol=1e-4, abs_tol=1e-5), name


MAKERS = [_ppo, _sft, _reward, _dpo]


@pytest.mark.parametrize("make", MAKERS)
def test_allocations_of_a_step_may_fail(make: Any, task: SimpleNamespace) -> None:
    """Wherever they are; with PPO that is an iteration with two steps of both models."""
    _same_step(make, task, num_points=10)


@pytest.mark.exhaustive  # minutes
@pytest.mark.parametrize("make", [_sft, _reward, _dpo])
def test_every_allocation_of_a_step_may_fail(make: Any, task: SimpleNamespace) -> None:
    """Those of PPO are in test_every_allocation.py."""
    _same_step(make, task, num_points=10**6)


def test_what_finds_no_memory_on_its_way_back_is_fetched_again(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parked model, in the middle of whose tensors memory ends."""
    expected, models = _ppo(task)
    expected.step()
    weights = [task.weights_of(model) for model in models]
    copy_back, left = ParkingPlace._copy_back, {"policy", "critic", "reference"}

    def fails(self: ParkingPlace) -> None:
        if self.name in left:
            left.remove(self.name)
            storage, size = self._parked[0]
            storage.resize_(size)
            raise torch.OutOfMemoryError("no memory for a parked tensor")
        copy_back(self)

    monkeypatch.setattr(ParkingPlace, "_copy_back", fails)
    trainer, models = _ppo(task, parking="on")
    trainer.step()
    assert not left
    trainer.residents.fetch_all()
    for model, before in zip(models, weights, strict=True):
        assert task.equal(task.weights_of(model), before)


@pytest.mark.parametrize("method, name, says", [
    ("_compute", "rollout", "generate: .* at least one sequence at a time, got none beside"),
    ("_compute", "scoring", "scoring: .* none for 8 of up to"),
    ("_judge", None, "rewards and advantages of iteration 0, 8 responses of up to .* tokens: "
                     ".*lower rollout_batch_size")])
def test_an_iteration_that_found_no_memory_can_be_run_again(
    method: str, name: str | None, says: str, task: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, models = _ppo(task)
    expected.step()
    weights = [task.weights_of(model) for model in models]
    trainer, models = _ppo(task)
    before, real = [task.weights_of(model) for model in models], getattr(trainer, method)

    def without_memory(*args: Any) -> Any:
        if name is not None and name not in args:
            return real(*args)
        with FailingAllocations(lambda number: number >= (300 if name == "rollout" else 10)):
            return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, method, without_memory)
        with pytest.raises(DeviceMemoryError, match=says):
            trainer.step()
    assert trainer.iteration == 0 and all(map(task.equal, before, map(task.weights_of, models)))
    trainer.step()
    assert trainer.iteration == 1
    _assert_close(models, weights)


def test_recomputed_log_probs_count_once(task: SimpleNamespace) -> None:
    """Where memory ends in the pass that recomputes them too."""
    trainer, _ = _ppo(task)
    rollout = trainer.engine.generate([[2, 3, 4]], SamplingConfig(max_new_tokens=2))
    wrong = dataclasses.replace(rollout, rollout_logprobs=rollout.rollout_logprobs - 1)
    with FailingAllocations(lambda number: False) as counted:
        expected, _ = trainer._old_logprobs(wrong)
    for n in range(0, counted.count, counted.count // 12):
        trainer.num_recomputed = 0
        with FailingAllocations.at(n):
            got, metrics = trainer._compute(PhaseTimer(), lambda: trainer._old_logprobs(wrong),
                                            "scoring", "policy")
        assert metrics["logprob/num_recomputed"] == trainer.num_recomputed == 1
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


def test_dropout_draws_the_same_masks_again(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is alone is repeated as it was, so that bits tell."""
    settings = {"batch_size": 1, "ptx_ratio": 0.0, "residual_dropout": 0.5}
    trainer, (model,) = _sft(task, **settings)
    trainer.step()
    again, (other,) = _sft(task, **settings)
    _fail_in_updates(monkeypatch, FailingAllocations(lambda number: number == 60))
    again.step()
    assert task.equal(task.weights_of(model), task.weights_of(other))
    assert again.budget.config.max_tokens_per_microbatch == 64


def test_the_lower_budget_stays_and_is_logged_once(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = _sft(task, ptx_ratio=0.0, max_steps=2)
    _fail_in_updates(monkeypatch, FailingAllocations(lambda number: number == 20))
    # Rows of 3 to 6 tokens, 18 in all.
    assert [trainer.step()["memory/max_tokens_per_microbatch"] for _ in range(2)] == [9.0, 9.0]
    lines = [r.message for r in caplog.records if "no memory for a pass" in r.message]
    assert len(lines) == 1 and "update: " in lines[0] and "passes of 9 tokens" in lines[0]


def test_a_row_that_does_not_fit_alone_is_named(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, (model,) = _sft(task, ptx_ratio=0.0)
    before = task.weights_of(model)
    expected, (other,) = _sft(task, ptx_ratio=0.0, max_tokens_per_microbatch=1)
    with monkeypatch.context() as patch:
        # In the midst of every attempt, where a row has its gradients already.
        _fail_in_updates(patch, FailingAllocations(lambda number: number % 150 == 149))
        with pytest.raises(DeviceMemoryError, match="update: .* none for 4 of up to 6 tokens; "
                                                    "lower the length limits"):
            trainer.step()
    assert task.equal(before, task.weights_of(model))
    assert all(p.grad is None for p in model.parameters())
    trainer.step()  # a later one begins without what the failed one had added up
    expected.step()
    assert task.equal(task.weights_of(model), task.weights_of(other))


def test_no_gradient_of_an_earlier_minibatch_is_left(task: SimpleNamespace) -> None:
    model = task.tiny_model()
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    TokenBudget(SFTConfig()).run(lambda config: None, AdamW(model.parameters()), [3])
    assert weight.grad is None


def test_another_error_is_not_memory(task: SimpleNamespace) -> None:
    model = task.tiny_model()

    def attempt(config: SFTConfig) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        TokenBudget(SFTConfig()).run(attempt, AdamW(model.parameters()), [3])


def test_a_cpu_without_memory_counts_too(task: SimpleNamespace) -> None:
    """What torch raises there is a plain RuntimeError."""
    seen: list[int] = []

    def attempt(config: SFTConfig) -> int:
        seen.append(config.max_tokens_per_microbatch)
        if len(seen) == 1:
            torch.empty(2**60)
        return 5

    budget = TokenBudget(SFTConfig(max_tokens_per_microbatch=100))
    assert budget.run(attempt, AdamW(task.tiny_model().parameters()), [30, 40]) == 5
    assert seen == [100, 35]


def _flat(result: Any) -> Tensor:
    """The numbers of a tensor, of several, or of a float, end to end."""
    parts = result if isinstance(result, list | tuple) else [result]
    return torch.cat([torch.as_tensor(part).double().flatten() for part in parts])


def test_every_allocation_of_a_reading_may_fail(task: SimpleNamespace) -> None:
    """Result buffers too, and a budget keeps what was learned."""
    trainer, _ = _ppo(task)
    rollout = trainer.engine.generate(
        [p.token_ids for p in task.PROMPTS[:2]], SamplingConfig(max_new_tokens=3),
        num_samples_per_prompt=2)
    model, scalar = task.tiny_model(seed=3), task.tiny_critic(task.tiny_model(seed=4))

    def read(budget: PassBudget) -> list[Tensor]:
        reading = read_trunk(scalar.backbone, rollout, budget, value_head=scalar.head,
                             score_head=scalar.head, keeps_states=True)
        return [reading.values, reading.scores, *reading.states]

    passes: list[Callable[[PassBudget], Any]] = [
        lambda budget: response_logprobs(model, rollout, 0.7, budget),
        lambda budget: response_values(scalar, rollout, budget), read,
        lambda budget: response_scores(scalar, rollout, budget),
        lambda budget: evaluate_token_loss(model, task.PTX[:2], budget)]
    for run in passes:
        with FailingAllocations(lambda number: False) as counted:
            result = run(PassBudget(1000))
        expected = _flat(result)
        for n in range(counted.count):
            budget = PassBudget(1000)
            with FailingAllocations(lambda number, n=n: number == n) as failing:
                got = run(budget)
            assert failing.count > counted.count and budget.max_tokens < 20
            assert float((_flat(got) - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("make, evaluate", [
    (lambda task: SFTTrainer(SFTConfig(max_tokens_per_microbatch=64), task.tiny_model(), EXAMPLES,
                             eval=EXAMPLES), lambda trainer: trainer._eval_loss()),
    (lambda task: RewardTrainer(RewardConfig(batch_size=2, max_tokens_per_microbatch=64),
                                scalar_from_causal(task.tiny_model(), 0), RANKINGS, eval=RANKINGS),
     lambda trainer: trainer.evaluate(RANKINGS).loss),
    (lambda task: DPOTrainer(DPOConfig(batch_size=2, max_tokens_per_microbatch=64),
                             task.tiny_model(), RANKINGS, eval=RANKINGS),
     lambda trainer: trainer.evaluate()["loss/dpo_eval"]),
])
def test_an_evaluation_keeps_its_lower_budget(
    make: Any, evaluate: Any, task: SimpleNamespace
) -> None:
    trainer = make(task)
    expected = evaluate(trainer)
    with FailingAllocations(lambda number: number == 12) as failing:
        got = evaluate(trainer)
    lower = trainer.passes.max_tokens
    assert failing.count > 12 and lower < 64
    evaluate(trainer)
    assert trainer.passes.max_tokens == lower
    assert math.isclose(got, expected, rel_tol=1e-5)


def test_a_sequence_that_cannot_be_scored_alone_is_named(task: SimpleNamespace) -> None:
    trainer, _ = _ppo(task)
    rollout = trainer.engine.generate([[2, 3, 4, 5]], trainer.config.sampling)
    scalar = copy.deepcopy(trainer.critic)
    length = len(rollout.sequence(0))
    expected = f"scoring: .* none for 1 of up to {length} tokens"
    with (FailingAllocations(lambda number: number > 10),
          pytest.raises(DeviceMemoryError, match=expected)):
        response_values(scalar, rollout, 1000)
