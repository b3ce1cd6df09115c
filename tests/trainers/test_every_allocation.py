"""Every allocation of a PPO iteration fails once: what each part computes stays what it is.

A part is run alone, on what the parts before it have given, so that a try costs milliseconds.
"""

import dataclasses
import logging
import math
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastrl.config import PPOConfig, SamplingConfig
from fastrl.errors import DeviceMemoryError
from fastrl.exactness import exact_math
from fastrl.metrics import RunFolder
from fastrl.models.causal_lm import CausalLM, scalar_from_causal
from fastrl.models.decoder import DecoderConfig, new_decoder
from fastrl.rewards import RewardModelScorer
from fastrl.trainers import common
from fastrl.trainers.ppo import PPOTrainer
from fastrl.types import Prompt, Rollout, TokenExample

FailingAllocations: Any = runpy.run_path(
    str(Path(__file__).parents[1] / "failing_allocations.py"))["FailingAllocations"]
BUDGET = 64
PTX = [TokenExample((2, 3, 4, 5), (False, True, True, True))] * 2


def _model(seed: int) -> CausalLM:
    return new_decoder(DecoderConfig(
        family="llama", vocab_size=16, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=8, rotary_dim=8, intermediate_size=8, max_positions=16, initializer_range=0.5,
        eos_token_ids=(1,)), seed)


def _trainer(task: SimpleNamespace, run: RunFolder, **settings: Any) -> PPOTrainer:
    """2 prompts x 2 responses of up to 3 tokens; a step of each model, then an evaluation."""
    policy = _model(0)
    trainer: PPOTrainer = task.make_trainer(
        policy, critic=scalar_from_causal(policy, 1), reference=_model(0),
        scorer=RewardModelScorer(scalar_from_causal(_model(2), 3), BUDGET),
        prompts=[Prompt((2, 3), ""), Prompt((4,), "")],
        inputs={"run": run, "ptx": PTX, "eval_prompts": [Prompt((5, 6), "")], "eval_ptx": PTX[:1]},
        **{"rollout_batch_size": 4, "minibatch_size": 4, "num_samples_per_prompt": 2,
           "num_iterations": 1, "sampling": SamplingConfig(max_new_tokens=3), "eval_steps": 1,
           "max_tokens_per_microbatch": BUDGET, "ptx_coef": 1.0, "ptx_ratio": 0.5,
           "ema_decay": 0.9, "eval_with_ema": True, "keep_best": True, **settings})
    return trainer


def _state(trainer: PPOTrainer) -> list[Tensor]:
    """All that an update writes."""
    return [*trainer.policy.parameters(), *trainer.critic.parameters(),
            *trainer.policy_learner.optimizer.state_dict().values(),
            *trainer.critic_learner.optimizer.state_dict().values(), *trainer.weights.averages()]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


class Iteration:
    """One iteration, taken apart: each part can be run again as if it were the first time.

    Args:
        trainer: New; its iteration is run once.
    """

    def __init__(self, trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer, self.config = trainer, trainer.budget.config
        self.runs: dict[str, Callable[[], Any]] = {"iteration": trainer.step}
        self.results: dict[str, Any] = {}
        self.before = {"iteration": _copies(_state(trainer))}
        self.after: dict[str, list[Tensor]] = {}
        self._engine = dict(vars(trainer.engine))
        self._take_apart(monkeypatch, trainer, "_compute", lambda timer, work, *parts: parts)
        self._take_apart(monkeypatch, type(trainer.evaluation), "_compute",
                         lambda own, work, *parts: ("evaluation", *parts))
        for learner, phase in ((trainer.policy_learner, "policy_update"),
                               (trainer.critic_learner, "critic_update")):
            self._take_apart(monkeypatch, learner, "learn", lambda *_, phase=phase: (phase,))
        self.results["iteration"] = trainer.step()
        self.after["iteration"] = _copies(_state(trainer))

    def _take_apart(
        self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str,
        parts_of: Callable[..., tuple[str, ...]],
    ) -> None:
        """What a method does is kept the first time, and is there at once when asked for again."""
        method = getattr(owner, name)

        def call(*args: Any) -> Any:
            part = " ".join(parts_of(*args))
            if part not in self.results:
                self.runs[part] = lambda: method(*args)
                self.before[part] = _copies(_state(self.trainer))
                result = method(*args)
                self.results[part] = _kept(result)
                self.after[part] = _copies(_state(self.trainer))
                return result
            if part.endswith("update"):
                self._put(self.after[part])
            return _kept(self.results[part])

        monkeypatch.setattr(owner, name, call)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for tensor, value in zip(_state(self.trainer), values, strict=True):
            tensor.copy_(value)

    def run(self, part: str, failing: Any) -> Any:
        """What a part gives with allocations that fail, after all was put back."""
        trainer, scorer = self.trainer, self.trainer.scorer
        self._put(self.before[part])
        vars(trainer.engine).update(self._engine)
        trainer.budget.__init__(self.config)  # type: ignore[misc]
        trainer.passes.max_tokens = scorer.passes.max_tokens = BUDGET  # type: ignore[attr-defined]
        trainer.iteration = trainer.policy_learner.num_ptx_windows = 0
        trainer.score_std = trainer.weights.best = None
        common._permutation.cache_clear()
        with exact_math("cpu", is_exact=True), failing:
            return self.runs[part]()

    def check(self, part: str, result: Any) -> None:
        """Bits, or 1e-5 of each tensor's norm where passes became smaller."""
        trainer, scorer = self.trainer, self.trainer.scorer
        passes = (trainer.passes, trainer.budget._passes, scorer.passes)  # type: ignore[attr-defined]
        tolerance = 1e-5 if any(x.max_tokens < BUDGET for x in passes) else 0.0
        pairs = zip(tree_leaves(_open(result)), tree_leaves(_open(self.results[part])), strict=True)
        for got, wanted in (*pairs, *zip(_state(trainer), self.after[part], strict=True)):
            if isinstance(wanted, Tensor) and wanted.is_floating_point():
                assert float((got.detach() - wanted).norm()) <= tolerance * float(wanted.norm())
            elif isinstance(wanted, float):
                assert math.isclose(got, wanted, rel_tol=10 * tolerance, abs_tol=tolerance)
            else:
                assert torch.equal(got, wanted) if isinstance(wanted, Tensor) else got == wanted


def _kept(result: Any) -> Any:
    """The same with metrics of its own, which an iteration adds to."""
    if isinstance(result, tuple):
        return tuple(map(_kept, result))
    return dict(result) if isinstance(result, dict) else result


def _open(result: Any) -> Any:
    """A rollout as its fields; numbers of the clock and of memory are left out."""
    if isinstance(result, Rollout):
        return [getattr(result, field.name) for field in dataclasses.fields(result)]
    if isinstance(result, dict):
        return {name: value for name, value in result.items()
                if name.partition("/")[0] not in ("time", "throughput", "memory")}
    return [_open(x) for x in result] if isinstance(result, tuple) else result


PARTS = ("rollout", "scoring policy", "scoring reference", "scoring critic",
         "scoring reward_model", "policy_update", "critic_update", "evaluation policy kv_cache",
         "evaluation reference", "evaluation reward_model", "evaluation policy", "iteration")
"""The last is what lies between the others."""
STRIDES = {"rollout": 4, "evaluation policy kv_cache": 13}
"""Of the longest calls: all their places take half a minute more than those of all others."""


@pytest.fixture
def iteration(
    task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Iteration]:
    """With a folder, into which an evaluation writes samples."""
    run = RunFolder(tmp_path / "run", PPOConfig(), stage="ppo")
    made, logger = Iteration(_trainer(task, run), monkeypatch), logging.getLogger("fastrl")
    assert set(made.results) == set(PARTS)
    level = logger.level
    logger.setLevel(logging.ERROR)  # thousands of warnings
    yield made
    logger.setLevel(level)  # the attribute alone would leave what loggers remember of it


def _count(iteration: Iteration, part: str) -> int:
    counted = FailingAllocations(lambda number: False)
    iteration.check(part, iteration.run(part, counted))
    return int(counted.count)


def _fail_one_by_one(iteration: Iteration, part: str, stride: int) -> None:
    for n in range(0, _count(iteration, part), stride):
        failing = FailingAllocations.at(n)
        result = iteration.run(part, failing)
        assert failing.count > n
        iteration.check(part, result)


@pytest.mark.parametrize("part", PARTS)
def test_any_allocation_of_an_iteration_may_fail(part: str, iteration: Iteration) -> None:
    """Every one, but for the engine's."""
    _fail_one_by_one(iteration, part, STRIDES.get(part, 1))


@pytest.mark.exhaustive  # a minute
@pytest.mark.parametrize("part", STRIDES)
def test_every_allocation_of_the_engine_may_fail(part: str, iteration: Iteration) -> None:
    _fail_one_by_one(iteration, part, 1)


@pytest.mark.parametrize("part", PARTS)
def test_memory_that_stays_short_changes_nothing(part: str, iteration: Iteration) -> None:
    """And is an error that names the part, sizes and settings, wherever it ends."""
    count = _count(iteration, part)
    may_be = [iteration.before[part]]
    if part == "iteration":  # an evaluation comes after the updates
        may_be.append(iteration.after[part])
    for n in range(0, count, max(1, count // 6)):
        with pytest.raises(DeviceMemoryError) as caught:
            iteration.run(part, FailingAllocations(lambda number, n=n: number >= n))
        assert re.search(SAYS, str(caught.value)), caught.value
        state = _state(iteration.trainer)
        assert any(all(map(torch.equal, state, wanted)) for wanted in may_be)


SAYS = (r"(generate|scoring|rewards and advantages|update|optimizer step|evaluation|order|"
        r"held-out loss).*: expected memory .* got none.*; .*(lower|make|set|ask) ")
