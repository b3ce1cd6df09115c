"""GRPO, Dr. GRPO, RLOO, REINFORCE++ and ReMax on the PPO page: what is learned, without what."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.advantages import (
    dr_grpo,
    grpo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
)
from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.errors import ConfigError
from fastrl.glossary import GLOSSARY
from fastrl.metrics import is_timing
from fastrl.models.causal_lm import CausalLM
from fastrl.ops import whiten
from fastrl.trainers.common import packed_forward
from fastrl.trainers.ppo_advantages import response_weights
from fastrl.trainers.ppo_update import backward_policy
from fastrl.types import Prompt, Rollout

GROUPED = {"num_samples_per_prompt": 4}
RULES: dict[str, dict[str, Any]] = {
    "grpo": {**GROUPED, "kl_in": "loss", "kl_estimator": "k3", "loss_mean": "sequence"},
    "dr_grpo": {**GROUPED, "loss_mean": "constant", "kl_in": "loss", "kl_estimator": "k2"},
    "rloo": GROUPED, "reinforce_plus_plus": {},
    "reinforce_plus_plus_baseline": {**GROUPED, "kl_in": "loss", "loss_mean": "group"},
    "remax": {"num_samples_per_prompt": 2, "clip_range_high": 0.3, "dual_clip": 3.0},
}


@pytest.mark.parametrize("rule", RULES)
def test_ratio_is_1_kl_is_0_and_reruns_are_equal(task: SimpleNamespace, rule: str) -> None:
    def run() -> tuple[list[dict[str, float]], list[Tensor]]:
        trainer = task.make_trainer(advantage=rule, learning_rate=1e-2, kl_coef=0.1,
                                    clip_range=1e-4 if "clip_range_high" not in RULES[rule]
                                    else 0.2, **RULES[rule])
        history = [{name: value for name, value in trainer.step().items() if not is_timing(name)}
                   for _ in range(3)]
        return history, task.weights_of(trainer.policy)

    history, weights = run()
    assert abs(history[0]["kl/policy_ref"]) < 1e-4
    for metrics in history:
        assert metrics["ratio/first_minibatch_max_error"] < 1e-4
        assert abs(metrics["ratio/first_minibatch_mean"] - 1) < 1e-4
        assert metrics["logprob/gap_max"] < 1e-4
        assert not [name for name in metrics if name.startswith("value/") or "critic" in name]
        assert "loss/value" not in metrics and all(
            name in GLOSSARY for name in metrics if not name.startswith("memory/"))
    assert abs(history[2]["kl/policy_ref"]) > 1e-3  # the policy did move
    again, same = run()
    assert again == history and task.equal(weights, same)


def rule_by_hand(rule: str, batch: Any, greedy: Tensor | None) -> Tensor:
    """Advantages [B, T] of a batch, without the code that chooses."""
    totals, scores = batch.rewards.sum(dim=1).reshape(-1, 4), batch.scores.reshape(-1, 4)
    per_response = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
    if rule in per_response:
        return per_response[rule](totals).reshape(-1, 1) * batch.mask
    if rule == "reinforce_plus_plus":
        return reinforce_plus_plus(batch.rewards, batch.mask, whiten_advantages=False)
    if rule == "reinforce_plus_plus_baseline":
        return reinforce_plus_plus_baseline(batch.rewards, scores, batch.mask,
                                            whiten_advantages=False)
    return remax(batch.rewards, greedy, batch.mask)


@pytest.mark.parametrize("rule", RULES)
def test_the_page_takes_the_rule_it_is_told(task: SimpleNamespace, rule: str) -> None:
    """With KL in the reward, from a reference that is another model."""
    scored: list[Rollout] = []

    def scorer(rollout: Rollout) -> Tensor:
        scored.append(rollout)
        return 10 * task.score_even(rollout)

    trainer = task.make_trainer(advantage=rule, reference=task.tiny_model(seed=7), scorer=scorer,
                                kl_coef=0.5, reward_clip=3.0, num_samples_per_prompt=4)
    batch = task.catch_batch(trainer)
    greedy = None
    if rule == "remax":
        first = scored[0]
        assert [first.batch_size, scored[1].batch_size] == [2, 8]
        again = trainer.engine.generate(
            [first.sequence(i)[:int(first.prompt_lens[i])] for i in range(2)],
            SamplingConfig(max_new_tokens=5, greedy=True), seed=99)
        assert torch.equal(again.response_ids, first.response_ids)
        assert float(task.score_even(first).max()) > 0.3  # so that the clip matters
        greedy = (10 * task.score_even(first)).clamp(max=3.0)
    else:
        assert len(scored) == 1
    assert batch.rewards.abs().gt(1e-3).sum() > 8  # KL on every token
    expected = rule_by_hand(rule, batch, greedy)
    torch.testing.assert_close(batch.raw_advantages, expected)
    is_whitened = rule.startswith("reinforce")
    torch.testing.assert_close(batch.advantages,
                               whiten(expected, batch.mask) if is_whitened else expected)
    assert batch.values is None and batch.returns is None


@pytest.mark.parametrize("choice", [True, False])
def test_whitening_can_be_chosen(task: SimpleNamespace, choice: bool) -> None:
    for rule in ("rloo", "reinforce_plus_plus"):
        batch = task.catch_batch(task.make_trainer(advantage=rule, whiten_advantages=choice,
                                                   **GROUPED))
        spread = float(batch.advantages[batch.mask].var(correction=0))
        assert (abs(spread - 1) < 1e-5) == choice


def test_kl_in_the_loss_is_not_in_the_reward(task: SimpleNamespace) -> None:
    """And its gradient is that of the two parts, each by its own call."""
    settings = {"advantage": "rloo", "kl_coef": 0.5, "reference": task.tiny_model(seed=7),
                "max_grad_norm": None, "minibatch_size": 8, **GROUPED}
    inside = task.make_trainer(kl_in="loss", **settings)
    batch = task.catch_batch(inside)
    assert batch.kl_coef == 0.5
    assert batch.rewards.ne(0).sum() == batch.scores.ne(0).sum()  # the scores, on the last tokens
    policy, config, rows = inside.policy, inside.config, list(range(8))

    def gradient(kl_in: str = "loss", **changes: Any) -> list[Tensor]:
        policy.zero_grad()
        backward_policy(policy, dataclasses.replace(batch, **changes), rows,
                        dataclasses.replace(config, kl_in=kl_in))
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    both, without = gradient(), gradient(kl_in="reward")
    kl_alone = gradient(advantages=torch.zeros_like(batch.advantages))
    for a, b, c in zip(both, without, kl_alone, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in kl_alone) > 1e-3
    # beta is that of the iteration, which a controller may have moved.
    twice = gradient(advantages=torch.zeros_like(batch.advantages), kl_coef=1.0)
    for a, b in zip(twice, kl_alone, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings, loss, clipped", [
    ({}, -1.2, 1.0), ({"clip_range_high": 0.5}, -1.5, 1.0), ({"clip_range_high": 2.0}, -2.0, 0.0)])
def test_the_clip_ranges_of_the_settings_are_those_of_the_loss(
    task: SimpleNamespace, settings: dict[str, float], loss: float, clipped: float
) -> None:
    """All ratios are 2 and all advantages 1; then -1, where only the dual clip bounds the loss."""
    trainer = task.make_trainer(advantage="rloo", **GROUPED, **settings)
    batch = task.catch_batch(trainer)
    shifted = dataclasses.replace(
        batch, old_logprobs=batch.old_logprobs - math.log(2), advantages=batch.mask.float())
    metrics = backward_policy(trainer.policy, shifted, [0, 1, 4, 5], trainer.config)
    assert metrics["loss/policy"] == pytest.approx(loss, abs=1e-4)
    assert metrics["clip/fraction"] == clipped
    bad = dataclasses.replace(shifted, advantages=-batch.mask.float())
    for dual_clip, bounded in ((None, 2.0), (1.5, 1.5)):
        config = dataclasses.replace(trainer.config, dual_clip=dual_clip)
        metrics = backward_policy(trainer.policy, bad, [0, 1, 4, 5], config)
        assert metrics["loss/policy"] == pytest.approx(bounded, abs=1e-4)


def test_groups_of_equal_scores_are_counted(task: SimpleNamespace) -> None:
    scores = torch.tensor([1.0, 1, 1, 1, 2, 2, 3, 2, 0, 0, 0, 0, 5, 5, 5, 6])
    trainer = task.make_trainer(advantage="grpo", scorer=lambda rollout: scores, **GROUPED,
                                rollout_batch_size=16)
    assert trainer.step()["reward/equal_group_share"] == 0.5


LENGTHS = torch.tensor([2, 4, 1, 3, 5, 5, 2, 4])


def test_weights_of_responses_by_hand() -> None:
    """Two groups of four; a minibatch of rows 1, 2, 5, 6 with 12 tokens."""
    rows, settings = [1, 2, 5, 6], {"sampling": SamplingConfig(max_new_tokens=5), **GROUPED}

    def weights(loss_mean: str) -> list[float]:
        config = PPOConfig(advantage="rloo", loss_mean=loss_mean, **settings)
        found = response_weights(config, LENGTHS, rows)
        assert found is not None
        return found.tolist()

    assert response_weights(PPOConfig(), LENGTHS, rows) is None
    assert weights("sequence") == pytest.approx([3 / 4, 3 / 1, 3 / 5, 3 / 2])
    assert weights("group") == pytest.approx([3 / 2.5, 3 / 2.5, 3 / 4, 3 / 4])
    assert weights("constant") == pytest.approx([3 / 5] * 4)


@pytest.mark.parametrize("loss_mean", ["token", "sequence", "group", "constant"])
def test_means_do_not_depend_on_microbatches_and_are_what_they_say(
    task: SimpleNamespace, loss_mean: str
) -> None:
    """The loss at ratio 1 is -1/n sum_i A_i T_i / L_i, since every token of a response has A_i."""
    trainer = task.make_trainer(task.tiny_model().double(), advantage="rloo", loss_mean=loss_mean,
                                minibatch_size=4, kl_in="loss", kl_coef=0.3, entropy_coef=0.1,
                                reference=task.tiny_model(seed=7).double(), dtype="float64",
                                **GROUPED)
    batch, rows = task.catch_batch(trainer), [1, 2, 5, 6]
    found = []
    for tokens in (1, 15, 1000):
        trainer.policy.zero_grad()
        config = dataclasses.replace(trainer.config, max_tokens_per_microbatch=tokens)
        metrics = backward_policy(trainer.policy, batch, rows, config)
        found.append([p.grad.clone() for p in trainer.policy.parameters()])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    lengths = batch.rollout.response_lens.double()
    advantages = batch.advantages[:, 0]
    divisors = {"token": lengths[rows].mean().expand(8), "sequence": lengths,
                "group": lengths.reshape(2, 4).mean(dim=1).repeat_interleave(4),
                "constant": torch.full((8,), 5.0)}[loss_mean]
    expected = -(advantages * lengths / divisors)[rows].mean()
    assert metrics["loss/policy"] == pytest.approx(float(expected), abs=1e-5)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a group of one": ({"advantage": "grpo"}, "num_samples_per_prompt: expected at least 2, "
                       "because advantage is 'grpo'"),
    "unknown rule": ({"advantage": "gpro"}, "advantage: expected one of gae, grpo, dr_grpo, rloo, "
                     "reinforce_plus_plus, .*, remax, got 'gpro'"),
    "discount of one number": ({"advantage": "rloo", "gamma": 0.9, **GROUPED}, "gamma: expected 1"),
    "dual clip below 1": ({"dual_clip": 0.5}, "dual_clip: expected None or a number above 1"),
    "no clip above": ({"clip_range_high": 0.0}, "clip_range_high: expected a number above 0"),
    "unknown mean": ({"loss_mean": "word"}, "loss_mean: expected one of token, sequence, group, "
                     "constant, got 'word'"),
    "unknown place": ({"kl_in": "score"}, "kl_in: expected one of reward, loss, got 'score'"),
    **{f"{name} without critic": (
        {"advantage": "reinforce_plus_plus", name: value},
        f"{name}: expected its default .*, because advantage is 'reinforce_plus_plus', which has "
        f"no critic, got {value!r}")
       for name, value in (("critic_learning_rate", 1.0), ("critic_max_grad_norm", 2.0),
                           ("value_clip_range", 0.5), ("value_coef", 0.5),
                           ("critic_init", "policy"), ("num_critic_warmup_iterations", 3),
                           ("lam", 0.9), ("whiten_rewards", True))},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictory_settings_are_refused(name: str) -> None:
    settings, message = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**settings)


def test_a_critic_for_nothing_and_one_that_lacks_are_refused(task: SimpleNamespace) -> None:
    policy = task.tiny_model()
    with pytest.raises(ConfigError, match="critic: expected None for advantage 'rloo', got a mod"):
        task.make_trainer(policy, critic=task.tiny_critic(policy), advantage="rloo", **GROUPED)
    trainer = task.make_trainer(policy)
    with pytest.raises(ConfigError, match="critic: expected a model for advantage 'gae', got None"):
        type(trainer)(trainer.config, policy, trainer.reference, None, task.score_even,
                      task.PROMPTS)


def test_no_critic_is_planned_held_or_parked(task: SimpleNamespace) -> None:
    def kept(**settings: Any) -> tuple[set[str], set[str], Any]:
        trainer = task.make_trainer(parking="on", **settings)
        trainer.step()
        planned = {name for phase in trainer.memory.plan.phases.values() for name in phase}
        planned |= {resident.name for resident in trainer.memory.plan.residents}
        return planned, set(trainer.residents.parts), trainer

    planned, parts, trainer = kept(advantage="grpo", **GROUPED)
    with_critic, parts_with, _ = kept()
    assert not [name for name in planned | parts if "critic" in name]
    assert with_critic - planned >= {"critic", "critic_optimizer", "critic_gradients"}
    assert parts_with - parts == {"critic", "critic_optimizer"}
    assert trainer.critic is None and trainer.critic_learner is None
    assert "critic_update" not in trainer.memory.plan.phases


def gibbs(reference: Tensor, scores: Tensor, beta: float) -> Tensor:
    """pi = pi_ref exp(r / beta) / Z: the optimum of E r - beta KL(pi || pi_ref)."""
    return (reference.log() + scores / beta).softmax(0)


def reverse(reference: Tensor, scores: Tensor, beta: float) -> Tensor:
    """pi = beta pi_ref / (level - r): the optimum of E r - beta KL(pi_ref || pi), by bisection."""
    low, high = float(scores.max()), float(scores.max()) + beta
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if (beta * reference / (level - scores)).sum() > 1 else (low,
                                                                                          level)
    return beta * reference / (high - scores)


def in_units_of_spread(reference: Tensor, scores: Tensor, beta: float) -> Tensor:
    """The fixed point of `reverse` for scores divided by their own spread under pi."""
    pi = reference
    for _ in range(300):
        mean = (pi * scores).sum()
        spread = (pi * (scores - mean).square()).sum().sqrt()
        pi = 0.5 * pi + 0.5 * reverse(reference, scores / spread, beta)
    return pi


GROUP = {"num_samples_per_prompt": 128}
KNOWN: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], dict[str, Any]]] = {
    "rloo": (gibbs, GROUP),
    "rloo, k1 in the loss": (gibbs, {**GROUP, "advantage": "rloo", "kl_in": "loss"}),
    "dr_grpo, k2 in the loss": (gibbs, {**GROUP, "advantage": "dr_grpo", "kl_in": "loss",
                                        "kl_estimator": "k2", "loss_mean": "constant"}),
    "rloo, k3 in the loss": (reverse, {**GROUP, "advantage": "rloo", "kl_in": "loss",
                                       "kl_estimator": "k3"}),
    "grpo": (in_units_of_spread, {**GROUP, "kl_in": "loss", "kl_estimator": "k3",
                                  "loss_mean": "sequence"}),
    "reinforce_plus_plus": (gibbs, {}),
    "reinforce_plus_plus_baseline": (gibbs, GROUP),
    "remax": (gibbs, {"rollout_batch_size": 256, "minibatch_size": 256}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_one_token_task_reaches_the_known_optimum(task: SimpleNamespace, name: str) -> None:
    """Nine tokens, scores from -1 to 1, beta 0.5, one step per iteration on fresh samples."""
    optimum_of, settings = KNOWN[name]
    policy, beta = task.tiny_model(vocab_size=9), 0.5
    scores = torch.linspace(-1, 1, 9)[torch.tensor([3, 7, 1, 0, 5, 8, 2, 6, 4])]
    prompt = Prompt((2, 3, 4), "")
    trainer = task.make_trainer(
        policy, prompts=[prompt], scorer=lambda rollout: scores[rollout.response_ids[:, 0]],
        **{"advantage": name, "sampling": SamplingConfig(max_new_tokens=1), "num_iterations": 45,
           "rollout_batch_size": 128, "minibatch_size": 128, "learning_rate": 2e-2,
           "lr_schedule": "linear", "min_lr_ratio": 0.0, "kl_coef": beta, "ema_decay": None,
           "num_logprob_checks": 0, "engine": EngineConfig(max_batch_size=128), **settings})
    start = next_token_probabilities(policy, prompt)
    optimum = optimum_of(start, scores, beta)
    assert float(optimum.sum()) == pytest.approx(1, abs=1e-4)
    assert total_variation(start, optimum) > 0.2
    trainer.train()
    assert total_variation(next_token_probabilities(policy, prompt), optimum) < 0.05


def next_token_probabilities(policy: CausalLM, prompt: Prompt) -> Tensor:
    """[V], the policy's distribution after the prompt."""
    with torch.no_grad():
        hidden, _ = packed_forward(policy, [prompt.token_ids])
        probabilities: Tensor = (hidden[-1] @ policy.lm_head.weight.T).softmax(0)
    return probabilities


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())
