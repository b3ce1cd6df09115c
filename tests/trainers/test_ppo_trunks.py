"""Critics on a shared trunk: what is shared, what is trained, and by which gradient."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.config import PPOConfig
from fastrl.errors import ConfigError
from fastrl.metrics import is_timing
from fastrl.models.attention import PackedAttention
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.models.heads import ScalarHead
from fastrl.models.scoring import read_trunk, response_scores, response_values
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.ppo_trunks import critic_weights, initial_critic
from fastrl.trainers.ppo_update import backward_critic, backward_policy

TRUNKS = ["reward", "policy"]


def make(task: SimpleNamespace, trunk: str, *, head_seed: int | None = 4, **settings: Any) -> Any:
    """A trainer with that trunk under its critic, and a reward model as scorer."""
    init = "policy" if trunk == "policy" else "reward"
    config = PPOConfig(**{**task.SETTINGS, "critic_trunk": trunk, "critic_init": init, **settings})
    policy = task.tiny_model()
    reward_model = scalar_from_causal(task.tiny_model(seed=5), 6)
    reward_model.head.bias.fill_(0.25)
    critic = initial_critic(config, policy, reward_model)
    if head_seed is not None and trunk == "policy":  # the head starts at 0
        randomize(critic.head, head_seed)
    return task.PPOTrainer(
        config, policy, None if config.reference == "none" else copy.deepcopy(policy), critic,
        RewardModelScorer(reward_model), task.PROMPTS, eval_prompts=task.PROMPTS)


def randomize(head: ScalarHead, seed: int) -> None:
    with torch.no_grad():
        head.weight.copy_(0.3 * torch.randn(head.weight.shape,
                                            generator=torch.Generator().manual_seed(seed)))


def bytes_of(*models: torch.nn.Module) -> int:
    """Bytes of all weights, every storage once."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                for model in models for p in model.parameters()}.values())


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_trunk_is_in_memory_once(task: SimpleNamespace, trunk: str) -> None:
    trainer = make(task, trunk)
    owner = trainer.policy if trunk == "policy" else trainer.scorer.model
    assert trainer.critic.backbone is owner.backbone
    width = trainer.policy.spec.hidden_size
    assert bytes_of(owner, trainer.critic) == bytes_of(owner) + 4 * width
    own = make(task, "own")
    assert bytes_of(own.critic, own.scorer.model) == 2 * bytes_of(own.critic)
    # And the optimisers hold what is trained, once.
    trained = len(list(trainer.policy.parameters())) + (trunk == "policy")
    assert len(trainer.policy_learner.optimizer.parameters) == trained
    assert [p is trainer.critic.head.weight
            for p in trainer.critic_learner.optimizer.parameters] == [True]
    assert critic_weights(trainer.config, trainer.critic) == [trainer.critic.head.weight]
    assert len(own.critic_learner.optimizer.parameters) == len(list(own.critic.parameters()))


def test_values_scores_and_states_come_from_one_pass(task: SimpleNamespace) -> None:
    trainer = make(task, "reward")
    passes = list[int]()
    trainer.critic.backbone.register_forward_hook(lambda *_: passes.append(1))
    trainer.step()
    assert len(passes) == 1  # values, scores, and what both minibatches of the update read
    rollout = task.catch_batch(trainer).rollout
    for max_tokens in (1, 17, 8192):
        reading = read_trunk(
            trainer.critic.backbone, rollout, max_tokens, value_head=trainer.critic.head,
            score_head=trainer.scorer.model.head, keeps_states=True)
        assert torch.equal(reading.values, response_values(trainer.critic, rollout, max_tokens))
        assert torch.equal(reading.scores, response_scores(trainer.scorer.model, rollout,
                                                           max_tokens))
        again = trainer.critic.head(torch.cat(reading.states))
        assert torch.equal(again, reading.values[rollout.response_mask])
        assert [len(s) for s in reading.states] == rollout.response_lens.tolist()


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_first_losses_are_those_of_a_separate_critic(
    task: SimpleNamespace, trunk: str
) -> None:
    """Until the first step a critic of its own with the same weights says the same."""
    shared = make(task, trunk, minibatch_size=8)
    own = make(task, "own", minibatch_size=8, critic_init=shared.config.critic_init)
    if trunk == "policy":
        randomize(own.critic.head, 4)
    ours, theirs = shared.step(), own.step()
    for name in ("loss/policy", "loss/value", "clip/value_fraction", "value/mean",
                 "reward/score_mean", "value/explained_variance", "kl/policy_ref"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert ours["ratio/first_minibatch_max_error"] < 1e-4
    if trunk == "reward":
        torch.testing.assert_close(shared.critic.head.weight, own.critic.head.weight)


def test_a_head_on_the_reward_model_leaves_the_scores_alone(task: SimpleNamespace) -> None:
    trainer = make(task, "reward", critic_learning_rate=1e-1)
    judge, head = task.weights_of(trainer.scorer.model), trainer.critic.head.weight.clone()
    batch = task.catch_batch(make(task, "reward"))
    before = trainer.scorer(batch.rollout)
    for _ in range(2):
        metrics = trainer.step()
    assert torch.equal(trainer.scorer(batch.rollout), before)
    assert task.equal(task.weights_of(trainer.scorer.model), judge)
    assert not torch.equal(trainer.critic.head.weight, head)
    assert metrics["grad/critic_norm"] > 0 and metrics["lr/critic"] == 1e-1


def hidden_states(trainer: Any, batch: Any, row: int) -> tuple[Tensor, Tensor]:
    """[T, D] at the tokens before the response of a row, and the response's tokens; one sequence
    at a time."""
    tokens = torch.tensor(batch.sequences[row])
    attention = PackedAttention(torch.tensor([0, len(tokens)]), len(tokens))
    hidden = trainer.policy.backbone(tokens, torch.arange(len(tokens)), attention)
    begin = int(batch.rollout.prompt_lens[row])
    return hidden[begin - 1:-1], tokens[begin:]


def loss_by_hand(trainer: Any, batch: Any, rows: list[int]) -> Tensor:
    """Clipped policy loss + value_coef * clipped value loss, token means, plain torch."""
    config, policy, values_of = trainer.config, [], []
    for row in rows:
        states, tokens = hidden_states(trainer, batch, row)
        length = len(tokens)
        logprobs = (states @ trainer.policy.lm_head.weight.T).log_softmax(-1)
        ratio = (logprobs[range(length), tokens] - batch.old_logprobs[row, :length]).exp()
        advantages = batch.advantages[row, :length]
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        policy.append(torch.maximum(-advantages * ratio, -advantages * clipped))
        values = states @ trainer.critic.head.weight + trainer.critic.head.bias
        old, returns = batch.values[row, :length], batch.returns[row, :length]
        near = old + (values - old).clamp(-config.value_clip_range, config.value_clip_range)
        values_of.append(0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2))
    return torch.cat(policy).mean() + config.value_coef * torch.cat(values_of).mean()


@pytest.mark.parametrize("value_coef", [0.0, 0.7])
@pytest.mark.parametrize("max_tokens", [1, 17, 8192])
def test_the_joint_gradient_is_that_of_the_sum_of_both_losses(
    task: SimpleNamespace, value_coef: float, max_tokens: int
) -> None:
    trainer = make(task, "policy", value_coef=value_coef, max_tokens_per_microbatch=max_tokens)
    batch = task.catch_batch(trainer)
    assert batch.critic_states is None  # nothing is kept that is not used
    trainer.policy.double()
    trainer.critic.head.double()
    with torch.no_grad():  # away from the sampling weights, so that ratios and clips are in play
        generator = torch.Generator().manual_seed(0)
        for p in trainer.policy_learner.optimizer.parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=generator).double())
    rows = [5, 2, 7, 0]
    loss_by_hand(trainer, batch, rows).backward()
    expected = [p.grad.clone() for p in trainer.policy_learner.optimizer.parameters]
    trainer.policy_learner.optimizer.zero_grad()
    backward_policy(trainer.policy, batch, rows, trainer.config, value_head=trainer.critic.head)
    assert (float(expected[-1].norm()) > 1e-3) == (value_coef > 0)  # the head's
    parameters = trainer.policy_learner.optimizer.parameters
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_a_head_is_that_of_the_critic_above_it(task: SimpleNamespace) -> None:
    """From states kept in scoring, in microbatches, as through the whole model."""
    trainer = make(task, "reward", minibatch_size=8, max_tokens_per_microbatch=17, value_coef=0.7)
    batch = task.catch_batch(trainer)
    head, rows = trainer.critic.head, [6, 1, 3]
    with torch.no_grad():
        head.weight.add_(0.2)
    metrics = backward_critic(trainer.critic, batch, rows, trainer.config)
    ours = head.weight.grad.clone()
    head.weight.grad = None
    whole = copy.copy(batch)
    object.__setattr__(whole, "critic_states", None)
    assert backward_critic(trainer.critic, whole, rows, trainer.config) == pytest.approx(metrics)
    torch.testing.assert_close(ours, head.weight.grad)
    assert not any(p.grad is not None for p in trainer.critic.backbone.parameters())


def test_one_step_trains_policy_and_head_with_one_rate_and_one_norm(task: SimpleNamespace) -> None:
    trainer = make(task, "policy", max_grad_norm=1e-3, critic_learning_rate=0.5)
    taken = []

    def step(learning_rate: float, scale: Tensor) -> None:
        norm = torch.stack([(scale * p.grad).norm()
                            for p in trainer.policy_learner.optimizer.parameters])
        taken.append((learning_rate, float(norm.norm()), float(norm[-1])))

    trainer.policy_learner.optimizer.step = step
    metrics = trainer.step()
    assert len(taken) == 2 and all(rate == 1e-3 for rate, _, _ in taken)
    assert all(norm == pytest.approx(1e-3, rel=1e-3) and 0 < head < norm
               for _, norm, head in taken)
    assert {"loss/policy", "loss/value", "grad/policy_norm"} <= metrics.keys()
    assert not {"lr/critic", "grad/critic_norm", "time/critic_update_s"} & metrics.keys()


def test_value_loss_reaches_the_shared_trunk(task: SimpleNamespace) -> None:
    """Without advantages the value loss is all there is to learn from."""
    def moved(value_coef: float) -> bool:
        trainer = make(task, "policy", value_coef=value_coef, kl_coef=0.0, learning_rate=1e-2,
                       ema_decay=None)
        trainer.scorer = lambda rollout: torch.zeros(rollout.batch_size)
        randomize(trainer.critic.head, 4)
        batch = task.catch_batch(trainer)
        batch.advantages.zero_()
        before = task.weights_of(trainer.policy.backbone)
        trainer.policy_learner.optimizer.zero_grad()
        backward_policy(trainer.policy, batch, [0, 1, 2, 3], trainer.config,
                        value_head=trainer.critic.head)
        trainer.policy_learner.optimizer.step(1e-2)
        return not task.equal(before, task.weights_of(trainer.policy.backbone))

    assert moved(1.0) and not moved(0.0)


def test_critic_warmup_trains_the_head_alone(task: SimpleNamespace) -> None:
    trainer = make(task, "policy", num_critic_warmup_iterations=1, critic_learning_rate=3e-2)
    policy, head = task.weights_of(trainer.policy), trainer.critic.head.weight.clone()
    passes = list[bool]()
    trainer.policy.backbone.register_forward_hook(
        lambda *_: passes.append(torch.is_grad_enabled()))
    metrics = trainer.step()
    assert not any(passes)
    assert task.equal(policy, task.weights_of(trainer.policy))
    assert all(p.grad is None for p in trainer.policy.parameters())
    assert not torch.equal(trainer.critic.head.weight, head)
    assert metrics["lr/critic"] == 3e-2 and metrics["loss/value"] > 0
    assert "loss/policy" not in metrics
    head = trainer.critic.head.weight.clone()
    metrics = trainer.step()
    assert "loss/policy" in metrics and "lr/critic" not in metrics
    assert metrics["ratio/first_minibatch_max_error"] < 1e-4
    assert not task.equal(policy, task.weights_of(trainer.policy))
    assert not torch.equal(trainer.critic.head.weight, head)


def test_an_iteration_that_ends_early_leaves_no_gradient(task: SimpleNamespace) -> None:
    trainer = make(task, "policy", max_approx_kl=1e-6, learning_rate=1e-2, num_inner_epochs=2)
    assert trainer.step()["update/num_minibatches"] == 1
    assert all(p.grad is None for p in trainer.policy_learner.optimizer.parameters)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_equal_seeds_give_equal_runs(task: SimpleNamespace, trunk: str) -> None:
    def run(seed: int) -> tuple[list[Tensor], list[dict[str, float]]]:
        trainer = make(task, trunk, seed=seed, learning_rate=1e-2)
        rows = [{name: value for name, value in trainer.step().items()
                 if not is_timing(name)} for _ in range(3)]
        return task.weights_of(trainer.policy) + task.weights_of(trainer.critic), rows

    first, second, other = run(3), run(3), run(4)
    assert task.equal(first[0], second[0]) and first[1] == second[1]
    assert not task.equal(first[0], other[0])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_microbatches_do_not_change_an_iteration(task: SimpleNamespace, trunk: str) -> None:
    def weights_after_a_step(max_tokens: int) -> list[Tensor]:
        trainer = make(task, trunk, max_tokens_per_microbatch=max_tokens, entropy_coef=0.1)
        trainer.step()
        return task.weights_of(trainer.policy) + task.weights_of(trainer.critic.head)

    whole = weights_after_a_step(8192)
    for max_tokens in (1, 17):
        for a, b in zip(whole, weights_after_a_step(max_tokens), strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm()) + 1e-9


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_tiny_task_is_learned(task: SimpleNamespace, trunk: str) -> None:
    """Scores rise by more than their spread at the start (a critic of its own: by 1.4 to 1.9)."""
    trainer = make(task, trunk, head_seed=None, learning_rate=1e-2, critic_learning_rate=3e-2,
                   rollout_batch_size=32, minibatch_size=16, num_iterations=16, kl_coef=0.01,
                   lam=1.0, num_inner_epochs=2)
    history = [trainer.step() for _ in range(16)]
    start, end = history[0], history[-1]
    gain = end["reward/score_mean"] - start["reward/score_mean"]
    assert gain > 1.0 > start["reward/score_std"]
    assert end["loss/value"] < start["loss/value"] / 2


PARKED: dict[str, dict[str, Any]] = {
    "trunk of the reward model": {"trunk": "reward"},
    "trunk of the policy": {"trunk": "policy", "num_critic_warmup_iterations": 1},
    "no reference": {"trunk": "policy", "reference": "none", "kl_coef": 0.0},
}


@pytest.mark.parametrize("variant", PARKED)
def test_parking_changes_no_number(task: SimpleNamespace, variant: str) -> None:
    def run(parking: str) -> tuple[list[dict[str, float]], list[Tensor], frozenset[str]]:
        trainer = make(task, **PARKED[variant], parking=parking, eval_steps=2, learning_rate=1e-2)
        rows = [{name: value for name, value in trainer.step().items()
                 if not is_timing(name)} for _ in range(3)]
        parked = trainer.residents.parked
        trainer.residents.fetch_all()
        return rows, task.weights_of(trainer.policy) + task.weights_of(trainer.critic), parked

    (rows, weights, parked), (expected, others, none) = run("on"), run("off")
    assert rows == expected and task.equal(weights, others)
    assert none == frozenset() and "policy_optimizer" in parked


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_shared_trunk_is_there_when_either_head_needs_it(
    task: SimpleNamespace, trunk: str
) -> None:
    trainer = make(task, trunk, parking="on")
    trainer.step()
    owner = "policy" if trunk == "policy" else "reward_model"
    weight, head = next(trainer.critic.backbone.parameters()), trainer.critic.head.weight

    def is_there(tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() > 0

    with trainer.residents.phase("scoring", "reference"):
        assert not is_there(weight) and not is_there(head)
    with trainer.residents.phase("scoring", owner, "critic"):
        assert is_there(weight) and is_there(head)
    with trainer.residents.phase("critic_update"):  # the head reads states that were kept
        assert not is_there(weight) and is_there(head)
    with trainer.residents.phase("policy_update"):
        assert is_there(head) == is_there(weight) == (trunk == "policy")


@pytest.mark.parametrize(("trunk", "init"), [("policy", "reward"), ("reward", "policy")])
def test_a_start_that_does_not_fit_the_trunk_is_refused(trunk: str, init: str) -> None:
    with pytest.raises(ConfigError, match=f"critic_init: expected '{trunk}', because critic_trunk "
                                          f"is '{trunk}'.*got '{init}'"):
        PPOConfig(critic_trunk=trunk, critic_init=init)
    with pytest.raises(ConfigError, match="critic_trunk: expected 'own', 'reward' or 'policy', got "
                                          "'shared'"):
        PPOConfig(critic_trunk="shared")


def test_a_critic_on_another_trunk_is_refused(task: SimpleNamespace) -> None:
    policy = task.tiny_model()
    reference, own = copy.deepcopy(policy), task.tiny_critic(policy)
    on_policy = scalar_from_causal(policy, 0, copies_trunk=False)
    judge = RewardModelScorer(task.tiny_critic(policy))

    def build(critic: Any, scorer: Any, **settings: Any) -> None:
        task.PPOTrainer(PPOConfig(**{**task.SETTINGS, **settings}), policy, reference, critic,
                        scorer, task.PROMPTS)

    with pytest.raises(ConfigError, match="critic on the policy's own trunk"):
        build(own, judge, critic_trunk="policy", critic_init="policy")
    with pytest.raises(ConfigError, match="got scorer function and"):
        build(own, task.score_even, critic_trunk="reward")
    with pytest.raises(ConfigError, match="critic on its trunk for 'reward', got scorer RewardMod"):
        build(own, judge, critic_trunk="reward")
    with pytest.raises(ConfigError, match="policy to have weights of its own, got those of the "
                                          "critic"):
        build(on_policy, judge)
    on_policy.head = judge.model.head
    with pytest.raises(ConfigError, match="reward model to have weights of its own, got those of "
                                          "the critic"):
        build(on_policy, judge, critic_trunk="policy", critic_init="policy")
