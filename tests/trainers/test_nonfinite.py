"""A NaN or an infinity is traced to sample and module; the step is skipped or the run ends."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.config import DPOConfig, RewardConfig, SFTConfig
from fastrl.errors import ConfigError, NumericsError
from fastrl.metrics import RunFolder
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.nonfinite import StepGuard
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison, Prompt, Rollout, TokenExample

BAD = 12
"""A token whose embedding is not finite."""
SETTINGS: dict[str, Any] = {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-3}


class NanGradient(torch.autograd.Function):
    """x, with a gradient that is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.nan


def poison(model: Any, token: int = BAD) -> Any:
    """The model with a NaN in the embedding of a token."""
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "embed" in name)[token, 3] = math.nan
    return model


def trainers(task: SimpleNamespace, **settings: Any) -> list[tuple[Any, Any]]:
    """A trainer of each kind with one bad row in its first batch, and its model."""
    examples = [TokenExample((2 + i, 3, 4, 1), (False, True, True, True)) for i in range(3)]
    bad = TokenExample((2, BAD, 4, 1), (False, True, True, True))
    rankings = [Comparison((2, 3 + i), ((4, 1), (5, 6, 1)), (0, 1)) for i in range(3)]
    worse = Comparison((2, BAD), ((4, 1), (5, 6, 1)), (0, 1))
    given = {**SETTINGS, **settings}
    models = [poison(task.tiny_model()), poison(scalar_from_causal(task.tiny_model(), 0)),
              task.tiny_model()]
    dpo = DPOTrainer(DPOConfig(**given), models[2], [*rankings, worse])
    poison(models[2])
    return [(SFTTrainer(SFTConfig(**given, select_by="last"), models[0], [*examples, bad]),
             models[0]),
            (RewardTrainer(RewardConfig(**given), models[1], [*rankings, worse]), models[1]),
            (dpo, models[2])]


def bits(*tensors: Any) -> list[bytes]:
    return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors
            if t.dim()] + [repr(t.item()).encode() for t in tensors if not t.dim()]


def everything(model: Any, optimizer: Any) -> list[bytes]:
    """Weights and optimiser state, bit for bit (NaN too)."""
    return bits(*model.parameters(), *optimizer.state_dict().values())


def test_one_bad_sample_ends_a_run_and_is_named(task: SimpleNamespace) -> None:
    for trainer, model in trainers(task):
        before = everything(model, trainer.optimizer)
        with pytest.raises(NumericsError, match=r"step 1: expected finite metrics, got loss/\w+ nan"
                           rf"; row \d alone has it, first in the output of \S*embed\S*; it begins "
                           rf"with \[2, {BAD}.*set on_nonfinite to skip"):
            trainer.step()
        assert everything(model, trainer.optimizer) == before
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_skipped_step_changes_nothing_and_is_counted(task: SimpleNamespace) -> None:
    for trainer, model in trainers(task, on_nonfinite="skip", max_skipped_steps=2):
        before = everything(model, trainer.optimizer)
        metrics = trainer.step()
        assert everything(model, trainer.optimizer) == before
        assert metrics["update/num_skipped"] == 1
        assert all(math.isfinite(value) for value in metrics.values())
        metrics = trainer.step()
        trainer.alarms.look(2, metrics)
        assert [alarm.name for alarm in trainer.alarms.current] == ["nonfinite"]
        with pytest.raises(NumericsError, match="step 3: .*2 steps before it were skipped in a "
                                                "row, max_skipped_steps"):
            trainer.step()


def test_the_count_of_steps_in_a_row_ends_with_a_step(task: SimpleNamespace) -> None:
    guard = StepGuard(SFTConfig(on_nonfinite="skip", max_skipped_steps=1))
    guard.refuse("first")
    guard.passed()
    guard.refuse("second")
    again = StepGuard(guard.config)
    again.load_state(guard.state())
    assert (again.num_skipped, again.num_in_a_row) == (2, 1)
    with pytest.raises(NumericsError, match="third; 1 steps before"):
        again.refuse("third")
    for settings in ({"on_nonfinite": "ignore"}, {"max_skipped_steps": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            SFTConfig(**settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite(task: SimpleNamespace, value: float) -> None:
    def scorer(rollout: Rollout) -> Tensor:
        scores = task.score_even(rollout)
        scores[5] = value
        return scores

    with pytest.raises(NumericsError, match="iteration 0: expected finite scores.*response 5 "
                                            ".*no model is behind these scores"):
        task.make_trainer(scorer=scorer).step()


def test_a_rollout_that_is_skipped_changes_nothing(
    task: SimpleNamespace, tmp_path: Path
) -> None:
    calls = []

    def scorer(rollout: Rollout) -> Tensor:
        calls.append(rollout)
        return task.score_even(rollout) * (math.nan if len(calls) == 2 else 1.0)

    settings = {"on_nonfinite": "skip", "num_iterations": 3}
    with RunFolder(tmp_path, task.make_trainer(**settings).config, stage="ppo") as folder:
        trainer = task.make_trainer(scorer=scorer, inputs={"run": folder}, **settings)
        trainer.step()
        learners = (trainer.policy_learner, trainer.critic_learner)
        before = [everything(m, learner.optimizer) for m, learner in zip(
            (trainer.policy, trainer.critic), learners, strict=True)]
        trainer.step()
        assert before == [everything(m, learner.optimizer) for m, learner in zip(
            (trainer.policy, trainer.critic), learners, strict=True)]
        assert "loss/policy" in trainer.step()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("update/num_skipped") for row in rows] == [None, 1, 1]
    assert [row.get("alarm/nonfinite") for row in rows] == [None, 1, 1]
    assert "reward/score_mean" in rows[2] and "reward/score_mean" not in rows[1]


@pytest.mark.parametrize("name", ["reference", "critic", "reward"])
def test_a_model_that_reads_nan_in_one_prompt(task: SimpleNamespace, name: str) -> None:
    """Only responses to a prompt with the bad token are hit, and the module is named."""
    prompts = [*task.PROMPTS, Prompt((2, BAD), "bad")]
    policy = task.tiny_model()
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(task.VOCABULARY))
    with torch.no_grad():
        policy.lm_head.bias[BAD] = -1e4  # never sampled
    models: dict[str, Any] = {"reference": copy.deepcopy(policy),
                              "critic": task.tiny_critic(policy)}
    inputs: dict[str, Any] = {"encoder": SimpleNamespace(decode=lambda ids: f"text of {ids}")}
    if name == "reward":
        models["scorer"] = RewardModelScorer(poison(task.tiny_critic(policy, 3)))
    else:
        poison(models[name])
    trainer = task.make_trainer(policy, prompts=prompts, rollout_batch_size=16, inputs=inputs,
                                **models)
    quantity = {"reference": "ref_logprobs", "critic": "values", "reward": "scores"}[name]
    with pytest.raises(NumericsError, match=rf"expected finite {quantity}.*in response \d+ .*after "
                       rf"prompt tokens \[2, {BAD}.*first in the output of \S*embed\S*; it begins "
                       rf"with 'text of \[2, {BAD}"):
        trainer.step()


def test_a_gradient_that_is_nan_is_traced_to_its_module(task: SimpleNamespace) -> None:
    for name, kind in (("policy", "policy's"), ("critic", "critic's")):
        trainer = task.make_trainer(on_nonfinite="skip")
        model = getattr(trainer, name)
        model.backbone.layers[0].mlp.register_forward_hook(
            lambda m, i, o: NanGradient.apply(o) if o.requires_grad else o)
        with pytest.raises(NumericsError, match=rf"the {kind} update, got grad/{name}_norm nan in "
                           r"the minibatch of responses .*alone has it, first in the "
                           r"gradient at the output of backbone.layers.0.mlp"):
            for _ in range(9):
                trainer.step()
        guard = getattr(trainer, f"{name}_learner").guard
        assert guard.num_skipped == 3
