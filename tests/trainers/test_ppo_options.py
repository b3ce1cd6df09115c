"""Every setting of PPOConfig does what its sentence says: one test per setting."""

import copy
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.advantages import gae
from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.errors import ConfigError, DataError, ModelError
from fastrl.metrics import RunFolder
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.models.weights import load_causal_lm
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.common import num_targets, token_loss
from fastrl.trainers.ppo_learners import minibatches
from fastrl.trainers.ppo_trunks import initial_critic
from fastrl.types import Prompt, Rollout


def test_gae_follows_the_golden_example() -> None:
    rewards = torch.tensor([[-0.01, 0.02, -0.03, 1.0]])
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, whiten_advantages=False)
    torch.testing.assert_close(advantages, torch.tensor([[0.7816, 0.728, 0.64, 0.6]]),
                               atol=1e-4, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.8816, 0.928, 0.94, 1.0]]),
                               atol=1e-4, rtol=0)
    whitened, same_returns = gae(rewards, values, mask)
    torch.testing.assert_close(whitened, torch.tensor([[1.318819, 0.568408, -0.66361, -1.223618]]),
                               atol=1e-4, rtol=0)
    torch.testing.assert_close(same_returns, returns)  # from the advantages before whitening


def test_whitened_rewards_keep_their_mean() -> None:
    rewards = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    mask, zeros = torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, 3)
    advantages, _ = gae(rewards, zeros, mask, lam=0.0, whiten_rewards=True,
                        whiten_advantages=False)
    torch.testing.assert_close(advantages[0], torch.tensor([0.0508, 0.4381, 0.8254]), atol=1e-4,
                               rtol=0)


def test_whiten_advantages(task: SimpleNamespace) -> None:
    batch = task.catch_batch(task.make_trainer())
    whitened = batch.advantages[batch.mask]
    assert abs(float(whitened.mean())) < 1e-5
    assert float(whitened.std(correction=0)) == pytest.approx(1.0, abs=1e-3)
    batch = task.catch_batch(task.make_trainer(whiten_advantages=False))
    torch.testing.assert_close(batch.advantages[batch.mask],
                               (batch.returns - batch.values)[batch.mask])


def test_whiten_rewards(task: SimpleNamespace) -> None:
    """With gamma 0 the returns are the rewards that GAE was given."""
    plain = task.catch_batch(task.make_trainer(gamma=0.0))
    torch.testing.assert_close(plain.returns[plain.mask], plain.rewards[plain.mask])
    white = task.catch_batch(task.make_trainer(gamma=0.0, whiten_rewards=True))
    returns = white.returns[white.mask]
    assert float(returns.std(correction=0)) == pytest.approx(1.0, abs=1e-3)
    assert float(returns.mean()) == pytest.approx(float(plain.returns[plain.mask].mean()), abs=1e-5)


def test_lam(task: SimpleNamespace) -> None:
    """With lambda 1 and gamma 1 the returns are sums of rewards, whatever the critic says."""
    batch = task.catch_batch(task.make_trainer(lam=1.0))
    torch.testing.assert_close(batch.returns[:, 0], batch.rewards.sum(dim=1))
    batch = task.catch_batch(task.make_trainer(lam=0.0))
    following = torch.nn.functional.pad(batch.values, (0, 1))[:, 1:]
    torch.testing.assert_close(batch.returns[batch.mask],
                               (batch.rewards + following)[batch.mask])


def other_reference(task: SimpleNamespace) -> Any:
    return task.tiny_model(seed=7)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimator_and_coefficient(task: SimpleNamespace, estimator: str) -> None:
    batch = task.catch_batch(task.make_trainer(
        reference=other_reference(task), kl_coef=0.3, kl_estimator=estimator))
    u = batch.ref_logprobs - batch.old_logprobs
    kl = {"k1": -u, "k2": u.square() / 2, "k3": u.exp() - 1 - u}[estimator]
    expected = -0.3 * kl * batch.mask
    last = batch.mask.sum(dim=1) - 1
    expected[torch.arange(len(last)), last] += batch.scores
    torch.testing.assert_close(batch.rewards, expected)


def test_adaptive_kl_moves_after_each_iteration(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(kl_controller="adaptive", kl_coef=0.1, kl_target=6.0,
                                kl_horizon=80.0)
    assert trainer.step()["kl/coef"] == 0.1
    # KL 0 is clipped to an error of -0.2; 8 episodes of a horizon of 80.
    assert trainer.step()["kl/coef"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 80))
    fixed = task.make_trainer(kl_coef=0.1, kl_horizon=80.0)
    fixed.step()
    assert fixed.step()["kl/coef"] == 0.1


def test_rewards_use_the_controllers_coefficient(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(reference=other_reference(task), kl_controller="adaptive")
    trainer.kl_controller.kl_coef = 0.9
    batch = task.catch_batch(trainer)
    expected = (batch.scores - 0.9 * (batch.old_logprobs - batch.ref_logprobs).sum(dim=1))
    torch.testing.assert_close(batch.rewards.sum(dim=1), expected)


def test_kl_coef_is_logged_in_units_of_the_first_scores(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(kl_coef=0.3)
    first = trainer.step()
    assert first["kl/coef_per_score_std"] == pytest.approx(0.3 / first["reward/score_std"])
    assert trainer.step()["kl/coef_per_score_std"] == first["kl/coef_per_score_std"]


def test_missing_eos_penalty_replaces_scores_of_unfinished_responses(task: SimpleNamespace) -> None:
    settings = {"scorer": lambda r: torch.full((r.batch_size,), 3.0), "rollout_batch_size": 32,
                "sampling": SamplingConfig(max_new_tokens=3)}
    batch = task.catch_batch(task.make_trainer(missing_eos_penalty=-2.0, **settings))
    expected = [3.0 if r == "stop" else -2.0 for r in batch.rollout.finish_reasons]
    assert batch.scores.tolist() == expected and set(expected) == {3.0, -2.0}
    off = task.catch_batch(task.make_trainer(missing_eos_penalty=None, **settings))
    assert set(off.scores.tolist()) == {3.0}


def test_no_response_that_stops_is_said_once(
    task: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """A penalty in place of every score is a constant: PPO would run for hours on nothing."""
    settings = {"rollout_batch_size": 32,
                "sampling": SamplingConfig(max_new_tokens=2, stop_token_ids=(1999,))}
    policy = task.tiny_model(vocab_size=2000)  # so many that none of 64 tokens is that one
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        task.make_trainer(policy, missing_eos_penalty=None, **settings).step()
        assert "none of the" not in caplog.text
        trainer = task.make_trainer(policy, missing_eos_penalty=-2.0, **settings)
        trainer.step()
        trainer.step()
    assert caplog.text.count("none of the 32 responses ended") == 1


def test_reward_clip_bounds_the_score_but_not_the_metric(task: SimpleNamespace) -> None:
    settings = {"scorer": lambda r: torch.linspace(-4, 4, r.batch_size)}
    batch = task.catch_batch(task.make_trainer(reward_clip=1.5, **settings))
    assert float(batch.scores.max()) == 1.5 and float(batch.scores.min()) == -1.5
    assert float(batch.raw_scores.max()) == 4.0
    free = task.catch_batch(task.make_trainer(**settings))
    assert float(free.scores.max()) == 4.0


def test_engine_gets_its_sizes_and_its_decoder(task: SimpleNamespace) -> None:
    sizes, decoder = EngineConfig(page_size=8, max_batch_size=3), SimpleNamespace(decode=str)
    trainer = task.make_trainer(engine=sizes, inputs={"encoder": decoder})
    assert trainer.engine.config == sizes and trainer.engine.encoder is decoder


def test_critic_warmup_leaves_the_policy_alone(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(num_critic_warmup_iterations=1, warmup_steps=2,
                                kl_controller="adaptive")
    policy, critic = task.weights_of(trainer.policy), task.weights_of(trainer.critic)
    metrics = trainer.step()
    assert task.equal(policy, task.weights_of(trainer.policy))
    assert not task.equal(critic, task.weights_of(trainer.critic))
    assert "loss/policy" not in metrics and trainer.kl_controller.kl_coef == 0.02
    # The policy's own warmup starts now, from a tenth of the peak.
    assert trainer.step()["lr/policy"] == pytest.approx(1e-4)
    assert not task.equal(policy, task.weights_of(trainer.policy))


def test_warmup_counts_iterations(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(warmup_steps=2, critic_learning_rate=2e-3)
    rates = [(m["lr/policy"], m["lr/critic"]) for m in (trainer.step() for _ in range(3))]
    assert rates == [pytest.approx(r) for r in ((1e-4, 2e-4), (5.5e-4, 1.1e-3), (1e-3, 2e-3))]


def test_lr_schedule_reaches_its_end(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(lr_schedule="linear", min_lr_ratio=0.5)
    assert [trainer.step()["lr/policy"] for _ in range(3)] == [
        pytest.approx(r) for r in (1e-3, 7.5e-4, 5e-4)]


def test_max_approx_kl_ends_the_update_of_an_iteration(task: SimpleNamespace) -> None:
    settings = {"learning_rate": 1e-2, "num_inner_epochs": 2}
    assert task.make_trainer(**settings).step()["update/num_minibatches"] == 4
    trainer = task.make_trainer(max_approx_kl=1e-6, **settings)
    assert trainer.step()["update/num_minibatches"] == 1
    assert trainer.policy_learner.optimizer.num_steps == 1
    assert trainer.critic_learner.optimizer.num_steps == 1


def test_max_kl_ends_training_and_keeps_the_best_weights(
    task: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = task.make_trainer(max_kl=0.5, num_iterations=50, learning_rate=5e-2, kl_coef=10.0,
                                eval_steps=50, ema_decay=None,
                                inputs={"eval_prompts": task.PROMPTS})
    before = task.weights_of(trainer.policy)
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        reason = trainer.train()
    assert "above max_kl 0.5" in reason and reason == trainer.stop_reason
    assert "above max_kl 0.5" in caplog.text
    assert trainer.iteration < 50
    # At beta 10 any KL costs more than the score can give: the weights before training are best.
    assert trainer.weights.best.iteration == 0
    assert task.equal(before, task.weights_of(trainer.policy))


def test_the_iteration_that_passes_max_kl_does_not_learn(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(reference=other_reference(task), max_kl=0.01)
    before = task.weights_of(trainer.policy)
    metrics = trainer.step()
    assert metrics["kl/policy_ref"] > 0.01 and "loss/policy" not in metrics
    assert task.equal(before, task.weights_of(trainer.policy))
    assert "all 3 iterations done" in task.make_trainer().train()


def test_ema_follows_every_optimiser_step(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(ema_decay=0.5, num_inner_epochs=2)
    expected = task.weights_of(trainer.policy)
    step = trainer.policy_learner.optimizer.step
    count = []

    def step_and_average(learning_rate: float, scale: Tensor | None) -> None:
        step(learning_rate, scale)
        count.append(1)
        for average, weight in zip(expected, trainer.policy.parameters(), strict=True):
            average.mul_(0.5).add_(weight.detach(), alpha=0.5)

    trainer.policy_learner.optimizer.step = step_and_average
    trainer.step()
    assert len(count) == 4
    for average, ours in zip(expected, trainer.weights.ema.averages, strict=True):
        torch.testing.assert_close(ours, average)


@pytest.mark.parametrize("eval_with_ema", [True, False])
def test_evaluation_uses_the_average_and_puts_the_weights_back(
    task: SimpleNamespace, eval_with_ema: bool
) -> None:
    trainer = task.make_trainer(eval_with_ema=eval_with_ema, learning_rate=1e-2, ema_decay=0.9,
                                eval_steps=100, inputs={"eval_prompts": task.PROMPTS})
    trainer.step()
    used = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda *a, **k: (
        used.extend(task.weights_of(trainer.policy)) or generate(*a, **k))
    now = task.weights_of(trainer.policy)
    trainer.evaluate()
    assert task.equal(used, trainer.weights.ema.averages if eval_with_ema else now)
    assert task.equal(now, task.weights_of(trainer.policy))
    assert trainer.step()["ratio/first_minibatch_max_error"] < 1e-4  # no stale pages


@pytest.mark.parametrize(
    ("ema_decay", "eval_with_ema", "kept"), [(0.9, True, "average"), (0.9, False, "last"),
                                             (None, True, "last")])
def test_what_is_saved_without_held_out_prompts(
    task: SimpleNamespace, ema_decay: float | None, eval_with_ema: bool, kept: str
) -> None:
    trainer = task.make_trainer(ema_decay=ema_decay, eval_with_ema=eval_with_ema)
    for _ in range(3):
        trainer.step()
    last = task.weights_of(trainer.policy)
    expected = trainer.weights.ema.averages if kept == "average" else last
    assert kept in trainer.weights.load_chosen()
    assert task.equal(task.weights_of(trainer.policy), expected)


@pytest.mark.parametrize(
    ("ema_decay", "eval_with_ema", "name"),
    [(0.9, True, "last_model"), (0.9, False, "average_model"), (None, True, None)])
def test_last_weights_and_average_are_both_saved(
    task: SimpleNamespace, tmp_path: Path, ema_decay: float | None, eval_with_ema: bool,
    name: str | None,
) -> None:
    with RunFolder(tmp_path / "run", PPOConfig(), stage="ppo") as run:
        trainer = task.make_trainer(ema_decay=ema_decay, eval_with_ema=eval_with_ema,
                                    inputs={"run": run})
        for _ in range(3):
            trainer.step()
        last = task.weights_of(trainer.policy)
        sides = {"last_model": last, "average_model": trainer.weights.ema and
                 [average.clone() for average in trainer.weights.ema.averages]}
        trainer.train()
    folders = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert folders == ([] if name is None else [name])
    if name is not None:
        saved = load_causal_lm(tmp_path / "run" / name)
        assert task.equal(task.weights_of(saved), sides[name])
        assert not task.equal(task.weights_of(saved), task.weights_of(trainer.policy))


@pytest.mark.parametrize("keep_best", [True, False])
def test_keep_best(task: SimpleNamespace, keep_best: bool) -> None:
    """The scorer likes the weights of the second evaluation only."""
    calls = []

    def scorer(rollout: Rollout) -> torch.Tensor:
        if rollout.batch_size == len(task.PROMPTS):  # an evaluation, not a rollout of 8
            calls.append(1)
            return torch.full((rollout.batch_size,), 9.0 if len(calls) == 2 else 0.0)
        return task.score_even(rollout)

    trainer = task.make_trainer(scorer=scorer, keep_best=keep_best, eval_steps=1, ema_decay=None,
                                kl_coef=0.0, inputs={"eval_prompts": task.PROMPTS})
    history = []
    for _ in range(3):
        trainer.step()
        history.append(task.weights_of(trainer.policy))
    trainer.train()
    assert len(calls) == 4
    assert task.equal(task.weights_of(trainer.policy), history[0] if keep_best else history[2])


def test_evaluations_are_comparable_and_of_the_size_asked_for(task: SimpleNamespace) -> None:
    sizes: list[int] = []
    trainer = task.make_trainer(
        scorer=lambda rollout: sizes.append(rollout.batch_size) or task.score_even(rollout),
        eval_steps=1, num_eval_prompts=4, learning_rate=1e-30,
        inputs={"eval_prompts": task.PROMPTS})
    first, second = trainer.step(), trainer.step()
    assert sizes == [4, 8, 4, 8, 4]
    for name in ("eval/reward_score_mean", "eval/response_length_mean"):
        assert first[name] == second[name]  # same prompts, same random numbers, same weights


def test_objective_is_the_used_score_minus_the_configs_beta_times_kl(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(
        eval_steps=1, kl_coef=0.3, kl_controller="adaptive", kl_horizon=8.0, learning_rate=1e-2,
        scorer=lambda r: torch.full((r.batch_size,), 5.0), reward_clip=2.0,
        missing_eos_penalty=-1.0, inputs={"eval_prompts": task.PROMPTS})
    trainer.step()
    metrics = trainer.step()
    assert metrics["kl/coef"] < 0.3 and abs(metrics["eval/kl_policy_ref"]) > 1e-4
    used = 2.0 * metrics["eval/response_eos_rate"] - (1 - metrics["eval/response_eos_rate"])
    assert metrics["eval/objective"] == pytest.approx(
        used - 0.3 * metrics["eval/kl_policy_ref"], abs=1e-5)


def test_ptx_adds_its_gradient_to_the_same_step(task: SimpleNamespace) -> None:
    def first_gradients(**settings: Any) -> tuple[Any, list[torch.Tensor]]:
        trainer = task.make_trainer(inputs={"ptx": task.PTX}, max_grad_norm=None, **settings)
        steps = task.catch_gradients(trainer)
        trainer.step()
        return trainer, steps[0]["policy"]

    _, plain = first_gradients()
    trainer, mixed = first_gradients(ptx_coef=0.7, ptx_ratio=1.25)
    # 1.25 windows for each of the 4 responses of a minibatch are the 5 windows there are.
    assert trainer.policy_learner.num_ptx_windows == 10
    trainer.policy.zero_grad()
    (0.7 * token_loss(trainer.policy, task.PTX, num_targets(task.PTX))).backward()
    for parameter, a, b in zip(trainer.policy.parameters(), plain, mixed, strict=True):
        torch.testing.assert_close(b - a, parameter.grad, atol=1e-5, rtol=1e-4)


def test_ptx_needs_text(task: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="ptx_coef.*0 windows"):
        task.make_trainer(ptx_coef=1.0)
    with pytest.raises(ConfigError, match="at least one window per minibatch"):
        task.make_trainer(ptx_coef=1.0, ptx_ratio=0.01, inputs={"ptx": task.PTX})


def norm(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


def test_clip_norms_are_separate(task: SimpleNamespace) -> None:
    def norms(**settings: Any) -> tuple[float, float]:
        trainer = task.make_trainer(**settings)
        steps = task.catch_gradients(trainer)
        metrics = trainer.step()
        assert metrics["grad/policy_norm"] > 1e-3 and metrics["grad/critic_norm"] > 1e-4
        return norm(steps[0]["policy"]), norm(steps[2]["critic"])  # 2 minibatches

    policy, critic = norms(max_grad_norm=None, critic_max_grad_norm=None)
    assert norms(max_grad_norm=1e-3, critic_max_grad_norm=None) == (
        pytest.approx(1e-3, rel=1e-3), pytest.approx(critic))
    assert norms(max_grad_norm=None, critic_max_grad_norm=1e-4) == (
        pytest.approx(policy), pytest.approx(1e-4, rel=1e-3))


def test_value_coef_scales_the_critics_gradient_only(task: SimpleNamespace) -> None:
    settings = {"max_grad_norm": None, "critic_max_grad_norm": None, "minibatch_size": 8}
    one = task.make_trainer(**settings).step()
    three = task.make_trainer(value_coef=3.0, **settings).step()
    assert three["grad/critic_norm"] == pytest.approx(3 * one["grad/critic_norm"], rel=1e-4)
    assert three["grad/policy_norm"] == pytest.approx(one["grad/policy_norm"], rel=1e-6)


def test_entropy_coef_is_a_bonus(task: SimpleNamespace) -> None:
    """Without advantages the bonus is the only gradient, and it raises the entropy."""
    def entropies(entropy_coef: float) -> list[float]:
        policy = task.tiny_model()
        critic = scalar_from_causal(policy, 0, init="zero")
        trainer = task.make_trainer(
            policy, critic=critic, scorer=lambda r: torch.zeros(r.batch_size), kl_coef=0.0,
            entropy_coef=entropy_coef, learning_rate=1e-2, num_iterations=6)
        return [trainer.step()["entropy/mean"] for _ in range(6)]

    before = task.weights_of(task.tiny_model())
    assert entropies(0.5)[-1] > entropies(0.0)[-1] + 0.1
    trainer = task.make_trainer(entropy_coef=0.0, kl_coef=0.0, critic=scalar_from_causal(
        task.tiny_model(), 0, init="zero"), scorer=lambda r: torch.zeros(r.batch_size))
    assert trainer.step()["grad/policy_norm"] == 0
    assert task.equal(before, task.weights_of(trainer.policy))


def test_clip_range_and_value_clip_range(task: SimpleNamespace) -> None:
    settings = {"num_inner_epochs": 3, "learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    tight = task.make_trainer(clip_range=1e-6, value_clip_range=1e-6, **settings).step()
    wide = task.make_trainer(clip_range=50.0, value_clip_range=50.0, **settings).step()
    off = task.make_trainer(clip_range=50.0, value_clip_range=None, **settings).step()
    assert tight["clip/fraction"] > 0 and tight["clip/value_fraction"] > 0
    assert wide["clip/fraction"] == 0 and wide["clip/value_fraction"] == 0
    assert off["clip/value_fraction"] == 0 and off["loss/value"] == wide["loss/value"]


def test_num_samples_per_prompt(task: SimpleNamespace) -> None:
    batch = task.catch_batch(task.make_trainer(num_samples_per_prompt=4))
    prompts = [tuple(s[:int(n)]) for s, n in zip(batch.sequences, batch.rollout.prompt_lens,
                                                 strict=True)]
    assert len(set(prompts)) == 2 and prompts[:4] == prompts[:1] * 4
    assert len({tuple(batch.rollout.response(i)) for i in range(4)}) > 1


def test_minibatches_of_inner_epochs_cover_every_response(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(num_inner_epochs=2)
    rows = list(minibatches(trainer.config, 8, 0))
    assert sorted(rows[0] + rows[1]) == list(range(8)) == sorted(rows[2] + rows[3])
    assert rows[0] + rows[1] != rows[2] + rows[3]


@pytest.mark.parametrize("critic_init", ["reward", "policy"])
def test_critic_init(task: SimpleNamespace, critic_init: str) -> None:
    policy, config = task.tiny_model(), PPOConfig(critic_init=critic_init)
    reward_model = scalar_from_causal(task.tiny_model(seed=5), 6)
    reward_model.head.bias.fill_(0.25)
    RewardModelScorer(reward_model)  # frozen by now
    critic = initial_critic(config, policy, reward_model)
    source = reward_model if critic_init == "reward" else policy
    assert task.equal(list(critic.backbone.parameters()), list(source.backbone.parameters()))
    assert float(critic.head.bias) == (0.25 if critic_init == "reward" else 0.0)
    assert bool((critic.head.weight == 0).all()) == (critic_init == "policy")
    assert all(p.requires_grad for p in critic.parameters())
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in source.parameters()}
    if critic_init == "reward":
        with pytest.raises(ConfigError, match="critic_init.*got none"):
            initial_critic(config, policy, None)


def test_long_prompts_are_dropped_and_counted(
    task: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        trainer = task.make_trainer(max_prompt_tokens=2)
    assert trainer.num_dropped_prompts == 2 and "dropped 2 of 6" in caplog.text
    assert all(len(p.token_ids) <= 2 for p in trainer.prompts)
    with pytest.raises(DataError, match="got none out of 2; raise max_prompt_tokens"):
        task.make_trainer(prompts=[task.PROMPTS[2], task.PROMPTS[4]], max_prompt_tokens=2)
    with pytest.raises(DataError, match="eval_prompts: expected at least one"):
        task.make_trainer(max_prompt_tokens=2, inputs={"eval_prompts": [task.PROMPTS[2]]})


def test_prompt_and_response_must_fit_the_positions(task: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="policy's 8 positions, got 9"):
        task.make_trainer(task.tiny_model(max_positions=8))
    critic = task.tiny_critic(task.tiny_model(max_positions=8))
    with pytest.raises(ConfigError, match="critic's 8 positions"):
        task.make_trainer(critic=critic)


def test_models_must_read_the_same_tokens(task: SimpleNamespace) -> None:
    with pytest.raises(ModelError, match="reference and policy.*14 and 13"):
        task.make_trainer(reference=task.tiny_model(vocab_size=14))
    for size in (12, 13 + 513):
        other = task.tiny_critic(task.tiny_model(vocab_size=size))
        with pytest.raises(ModelError, match=f"critic and policy.*{size} and 13"):
            task.make_trainer(critic=other)
        with pytest.raises(ModelError, match=f"reward model and policy.*{size} and 13"):
            task.make_trainer(scorer=RewardModelScorer(other))
    task.make_trainer(critic=task.tiny_critic(task.tiny_model(vocab_size=16)))  # rounded up
    with pytest.raises(DataError, match=r"prompt 0 .*vocabulary size 13, got \[2, 99\]"):
        task.make_trainer(prompts=[Prompt((2, 99), "")])


def test_models_must_not_share_weights(task: SimpleNamespace) -> None:
    policy = task.tiny_model()
    with pytest.raises(ConfigError, match=r"reference to have weights of its own.*deepcopy\(pol"):
        task.make_trainer(policy, reference=policy)
    critic = task.tiny_critic(policy)
    with pytest.raises(ConfigError, match="reward model to have weights of its own.*the critic"):
        task.make_trainer(policy, critic=critic, scorer=RewardModelScorer(critic))


def test_no_way_to_stop_and_a_penalty_for_not_stopping_is_refused(task: SimpleNamespace) -> None:
    sampling = SamplingConfig(max_new_tokens=5, stop_token_ids=())
    with pytest.raises(ConfigError, match="missing_eos_penalty.*no stop tokens"):
        task.make_trainer(missing_eos_penalty=-1.0, sampling=sampling)
    task.make_trainer(missing_eos_penalty=None, sampling=sampling)


@pytest.mark.parametrize(("name", "value"), [
    ("top_k", 3), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 1.1), ("greedy", True),
    ("min_new_tokens", 1)])
def test_truncated_sampling_is_refused_unless_log_probs_are_raw(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match="set sampling.logprobs to raw"):
        PPOConfig(sampling=SamplingConfig(**{name: value}))
    PPOConfig(sampling=SamplingConfig(**{name: value}, logprobs="raw"))


def test_models_are_in_eval_mode_and_the_reference_is_frozen(task: SimpleNamespace) -> None:
    policy = task.tiny_model()
    reference, critic = copy.deepcopy(policy), task.tiny_critic(policy)
    for model in (policy, reference, critic):
        model.train()
    before = task.weights_of(reference)
    trainer = task.make_trainer(policy, reference=reference, critic=critic)
    trainer.step()
    assert not (policy.training or reference.training or critic.training)
    assert not any(p.requires_grad for p in reference.parameters())
    assert task.equal(before, task.weights_of(reference))
