"""PPO without a reference: nothing is measured against it, and nothing may ask for it."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.config import PPOConfig
from fastrl.errors import ConfigError
from fastrl.metrics import is_timing
from fastrl.runs import PPORun

NONE: dict[str, Any] = {"reference": "none", "kl_coef": 0.0}


def trainer_without(task: SimpleNamespace, **settings: Any) -> Any:
    policy = task.tiny_model()
    config = PPOConfig(**{**task.SETTINGS, **NONE, **settings})
    return task.PPOTrainer(config, policy, None, task.tiny_critic(policy), task.score_even,
                           task.PROMPTS, eval_prompts=task.PROMPTS)


def test_kl_is_absent_and_everything_else_as_with_a_reference(task: SimpleNamespace) -> None:
    """With beta 0 a reference changes no number: it only adds those that are measured on it."""
    ours, theirs = trainer_without(task, eval_steps=1), task.make_trainer(
        kl_coef=0.0, eval_steps=1, inputs={"eval_prompts": task.PROMPTS})
    for _ in range(2):
        without, with_reference = ours.step(), theirs.step()
        missing = with_reference.keys() - without.keys()
        assert missing == {"kl/policy_ref", "kl/policy_ref_k3", "kl/coef", "kl/coef_per_score_std",
                           "eval/kl_policy_ref", "eval/kl_policy_ref_k3"}
        assert not without.keys() - with_reference.keys()
        assert all(math.isfinite(value) for value in without.values())
        same = [name for name in without if not is_timing(name)]
        assert {n: without[n] for n in same} == {n: with_reference[n] for n in same}
    assert task.equal(task.weights_of(ours.policy), task.weights_of(theirs.policy))
    assert without["eval/objective"] == without["eval/reward_score_mean"]  # no clip, no penalty


def test_a_batch_has_no_reference(task: SimpleNamespace) -> None:
    batch = task.catch_batch(trainer_without(task))
    assert batch.ref_logprobs is None and batch.kl_estimates is None
    last = torch.arange(8), batch.mask.sum(dim=1) - 1
    assert torch.equal(batch.rewards[last], batch.scores)
    assert float(batch.rewards.abs().sum()) == float(batch.scores.abs().sum())


def test_the_best_weights_are_those_with_the_highest_score(task: SimpleNamespace) -> None:
    trainer = trainer_without(task, eval_steps=1, ema_decay=None, learning_rate=2e-2)
    history = [trainer.evaluate()["eval/objective"]]
    history += [trainer.step()["eval/objective"] for _ in range(3)]
    assert trainer.weights.best.objective == max(history) > history[0]


@pytest.mark.parametrize(("settings", "message"), [
    ({"kl_coef": 0.02}, "kl_coef: expected 0, because reference is 'none', got 0.02"),
    ({"kl_controller": "adaptive"}, "kl_controller: expected 'fixed', because reference is 'none'"),
    ({"max_kl": 5.0}, "max_kl: expected None, because reference is 'none', got 5.0"),
    ({"reference": "frozen"}, "reference: expected 'copy', 'none' or 'adapters_off', got 'frozen'"),
])
def test_settings_that_need_a_reference_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**{**NONE, **settings})
    with pytest.raises(ConfigError, match="reference_model: expected None, because reference is"):
        PPORun(**NONE, model_name_or_path="a", output_dir="b", prompts=("c",), reward_model="d",
               reference_model="e")


def test_setting_and_model_must_agree(task: SimpleNamespace) -> None:
    policy = task.tiny_model()
    rest = (task.tiny_critic(policy), task.score_even, task.PROMPTS)
    with pytest.raises(ConfigError, match="reference: expected a model for reference 'copy', got "
                                          "None"):
        task.PPOTrainer(PPOConfig(**task.SETTINGS), policy, None, *rest)
    with pytest.raises(ConfigError, match="expected None for reference 'none', got a model"):
        task.PPOTrainer(PPOConfig(**{**task.SETTINGS, **NONE}), policy, copy.deepcopy(policy),
                        *rest)
