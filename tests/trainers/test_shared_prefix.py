"""PPO with several samples of a prompt: the prompt is read once, and nothing else changes."""

from types import SimpleNamespace

import pytest
import torch

from fastrl.backends import choose, prefer
from fastrl.exactness.settings import ONE_KERNEL
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.common import packed_forward
from fastrl.trainers.dpo_pairs import completion_logprobs
from fastrl.trainers.ppo_update import backward_critic, backward_policy
from fastrl.types import Comparison


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_the_same_shared_or_apart_under_any_budget(
    task: SimpleNamespace, dtype: torch.dtype
) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    trainer = task.make_trainer(num_samples_per_prompt=4, entropy_coef=0.1)
    batch, rows = task.catch_batch(trainer), [5, 0, 7, 2, 1, 6]  # of two prompts, in turns
    policy, critic = trainer.policy.to(dtype), trainer.critic.to(dtype)
    with torch.no_grad():  # away from the sampling weights, so that ratios and clips are in play
        for p in [*policy.parameters(), *critic.parameters()]:
            p.add_(0.02 * torch.randn_like(p))

    def gradients(**settings: object) -> tuple[list[torch.Tensor], int]:
        config = task.make_trainer(num_samples_per_prompt=4, entropy_coef=0.1, **settings).config
        seen = []
        hooks = [m.backbone.register_forward_pre_hook(
            lambda module, arguments: seen.append(len(arguments[0]))) for m in (policy, critic)]
        for model in (policy, critic):
            model.zero_grad()
        backward_policy(policy, batch, rows, config)
        backward_critic(critic, batch, rows, config)
        for hook in hooks:
            hook.remove()
        return [p.grad.clone() for m in (policy, critic) for p in m.parameters()], sum(seen)

    expected, num_apart = gradients(share_prefix=False)
    assert num_apart == 2 * sum(len(batch.sequences[i]) for i in rows)
    num_tokens = []
    for max_tokens in (8192, 17, 1):
        found, num_shared = gradients(max_tokens_per_microbatch=max_tokens)
        num_tokens.append(num_shared)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).norm()) <= tolerance * float(b.norm())
    prompt_lens = batch.rollout.prompt_lens.tolist()
    repeated = 2 * prompt_lens[0] + 2 * prompt_lens[4]  # rows 0, 1, 2 and 5, 6, 7
    assert num_tokens[0] == num_apart - 2 * repeated
    assert num_tokens[0] < num_tokens[1] < num_tokens[2] == num_apart


def test_an_iteration_is_the_same_and_every_model_reads_less(task: SimpleNamespace) -> None:
    results = []
    for share_prefix in (True, False):
        policy = task.tiny_model()
        reward_model = scalar_from_causal(policy, seed=3)
        trainer = task.make_trainer(
            policy, scorer=RewardModelScorer(reward_model, share_prefix=share_prefix),
            num_samples_per_prompt=4, share_prefix=share_prefix, logprob_tolerance=1e-12)
        seen = dict.fromkeys(("policy", "critic", "reference", "reward_model"), 0)
        for name in seen:
            model = reward_model if name == "reward_model" else getattr(trainer, name)
            model.backbone.register_forward_pre_hook(
                lambda module, arguments, attention=None, name=name, seen=seen: seen.update(
                    {name: seen[name] + len(arguments[0])})
                if type(arguments[2]).__name__ == "PackedAttention" else None)
        metrics = trainer.step()
        results.append((metrics, seen, task.weights_of(trainer.policy)
                        + task.weights_of(trainer.critic)))
    (metrics, seen, weights), (other, apart, other_weights) = results
    assert metrics["logprob/num_recomputed"] == other["logprob/num_recomputed"] == 1
    assert metrics["loss/policy"] == pytest.approx(other["loss/policy"], abs=1e-6)
    for a, b in zip(weights, other_weights, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())
    assert all(0 < seen[name] < apart[name] for name in seen)


def test_log_probs_of_completions_share_their_prompt(task: SimpleNamespace) -> None:
    model = task.tiny_model()
    comparisons = [Comparison((2, 3, 4, 5), ((6, 7), (8,), (9, 10, 11)), (0, 1, 2)),
                   Comparison((3,), ((6,), (7, 8)), (1, 0))]
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, arguments:
                                             seen.append(len(arguments[0])))
    shared, apart = (completion_logprobs(model, comparisons, share_prefix=share_prefix)
                     for share_prefix in (True, False))
    torch.testing.assert_close(shared, apart, rtol=0, atol=2e-6)
    assert seen == [10 + 4, 18 + 5]


def test_exact_mode_takes_one_kernel_for_prompts_shared_or_not() -> None:
    assert ONE_KERNEL["prefix_attention"] == ONE_KERNEL["packed_attention"]
    with prefer(ONE_KERNEL):
        taken = {op: choose(op, op, ("flash", "torch", "triton"), "cuda", torch.bfloat16)
                 for op in ("packed_attention", "prefix_attention")}
    assert len(set(taken.values())) == 1


def test_a_pack_without_samples_of_one_prompt_has_the_same_bits(task: SimpleNamespace) -> None:
    model, sequences = task.tiny_model(), [[2, 3, 4], [5, 3], [2, 3, 6]]
    shared, apart = (packed_forward(model, sequences, [2, 1, 2], share_prefix=share_prefix)[0]
                     for share_prefix in (True, False))
    assert torch.equal(shared, apart)
