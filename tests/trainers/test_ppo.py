"""What must hold for every PPO run: ratio 1, KL 0, the known optimum, equal reruns."""

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.config import PPOConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.errors import NumericsError
from fastrl.glossary import GLOSSARY
from fastrl.metrics import RunFolder, is_timing
from fastrl.models.attention import PackedAttention
from fastrl.models.causal_lm import CausalLM
from fastrl.models.decoder import new_decoder
from fastrl.models.scoring import response_logprobs
from fastrl.models.weights import load_causal_lm
from fastrl.trainers.old_logprobs import largest_gap
from fastrl.trainers.ppo_update import backward_critic, backward_policy, batch_metrics
from fastrl.types import Prompt, Rollout

VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ptx": {"ptx_coef": 0.5, "ptx_ratio": 2.0},
    "several samples": {"num_samples_per_prompt": 4},
    "temperature": {"sampling": SamplingConfig(max_new_tokens=5, temperature=0.7)},
    "raw log-probs": {"sampling": SamplingConfig(max_new_tokens=5, top_k=3, temperature=0.7,
                                                 logprobs="raw")},
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ratio_is_1_and_kl_is_0_at_the_start(
    task: SimpleNamespace, variant: str, architecture: str
) -> None:
    trainer = task.make_trainer(task.tiny_model(architecture), inputs={"ptx": task.PTX},
                                learning_rate=1e-2, **VARIANTS[variant])
    metrics = trainer.step()
    assert abs(metrics["kl/policy_ref"]) < 1e-4
    assert metrics["kl/policy_ref_k3"] < 1e-4
    for _ in range(2):  # the engine must sample from the weights that the update left
        assert abs(metrics["ratio/first_minibatch_mean"] - 1) < 1e-4
        assert metrics["ratio/first_minibatch_max_error"] < 1e-4
        assert metrics["logprob/gap_max"] < 1e-4
        assert metrics["logprob/num_recomputed"] == 0
        metrics = trainer.step()
    assert abs(metrics["kl/policy_ref"]) > 1e-3  # the policy did move


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_itself_starts_at_ratio_1(task: SimpleNamespace, variant: str) -> None:
    """With one minibatch every statistic of the loss is of the state before the step."""
    trainer = task.make_trainer(inputs={"ptx": task.PTX}, minibatch_size=8, clip_range=1e-4,
                                **VARIANTS[variant])
    metrics = trainer.step()
    assert metrics["kl/approx"] < 1e-8 and metrics["clip/fraction"] == 0
    assert metrics["ratio/effective_share"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip/value_fraction"] == 0


@pytest.mark.parametrize("variant", ["ppo", "ptx", "raw log-probs"])
def test_ratio_is_1_and_kl_is_0_on_the_generic_path(
    task: SimpleNamespace, variant: str, tmp_path: Path
) -> None:
    """A model that is not native: transformers computes both sides, cached and packed."""
    import transformers

    torch.manual_seed(1)
    transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=13, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, init_std=0.4, bos_token_id=0,
        pad_token_id=0, eos_token_id=1)).save_pretrained(tmp_path)
    trainer = task.make_trainer(load_causal_lm(tmp_path), inputs={"ptx": task.PTX},
                                learning_rate=1e-2, **VARIANTS[variant])
    metrics = trainer.step()
    assert abs(metrics["kl/policy_ref"]) < 1e-4
    for _ in range(2):
        assert metrics["ratio/first_minibatch_max_error"] < 1e-4
        assert metrics["logprob/gap_max"] < 1e-4
        metrics = trainer.step()
    assert abs(metrics["kl/policy_ref"]) > 1e-3


def test_one_token_task_reaches_the_known_optimum(task: SimpleNamespace) -> None:
    """pi*(y) = pi_ref(y) exp(r(y) / beta) / Z, here with beta 0.5 and scores from -1 to 1."""
    policy, beta = task.tiny_model(vocab_size=9), 0.5
    scores = torch.linspace(-1, 1, 9)[torch.tensor([3, 7, 1, 0, 5, 8, 2, 6, 4])]
    prompt = Prompt((2, 3, 4), "")
    trainer = task.make_trainer(
        policy, prompts=[prompt], scorer=lambda rollout: scores[rollout.response_ids[:, 0]],
        sampling=SamplingConfig(max_new_tokens=1), num_iterations=60, rollout_batch_size=256,
        minibatch_size=64, num_inner_epochs=2, learning_rate=1e-2, critic_learning_rate=3e-2,
        lr_schedule="linear", min_lr_ratio=0.0, kl_coef=beta, value_clip_range=None,
        whiten_advantages=False)
    start = next_token_probabilities(trainer, prompt)
    optimum = start * (scores / beta).exp()
    optimum /= optimum.sum()
    assert total_variation(start, optimum) > 0.3
    trainer.train()
    assert total_variation(next_token_probabilities(trainer, prompt), optimum) < 0.03


def next_token_probabilities(trainer: Any, prompt: Prompt) -> torch.Tensor:
    """[V], the policy's distribution after the prompt, by the scoring forward."""
    vocab_size, length = trainer.policy.spec.vocab_size, len(prompt.token_ids)
    rollout = Rollout(
        token_ids=torch.tensor([[*prompt.token_ids, t] for t in range(vocab_size)]).flatten(),
        cu_seqlens=torch.arange(vocab_size + 1) * (length + 1),
        prompt_lens=torch.full((vocab_size,), length),
        response_ids=torch.arange(vocab_size)[:, None],
        response_mask=torch.ones(vocab_size, 1, dtype=torch.bool),
        rollout_logprobs=torch.zeros(vocab_size, 1), entropy=torch.zeros(vocab_size, 1),
        finish_reasons=("length",) * vocab_size)
    logprobs, _ = response_logprobs(trainer.policy, rollout, 1.0, 8192)
    return logprobs[:, 0].exp()


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def shifted_weights(policy: CausalLM) -> CausalLM:
    """A copy with slightly other weights: what an engine that missed an update would use."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        next(other.backbone.parameters()).add_(0.05)
    return other


def other_rotary_base(policy: CausalLM) -> CausalLM:
    """A copy with another rotary base: what a wrong cached forward would compute."""
    other = new_decoder(dataclasses.replace(policy.backbone.config, rotary_base=100.0), seed=0)
    other.load_state_dict(policy.state_dict())
    return other


@pytest.mark.parametrize(("change", "place"), [
    (shifted_weights, "embedding"), (other_rotary_base, "layer 0 attention")])
def test_a_mismatch_between_engine_and_update_is_caught(
    task: SimpleNamespace, caplog: pytest.LogCaptureFixture,
    change: Callable[[CausalLM], CausalLM], place: str,
) -> None:
    trainer = task.make_trainer(minibatch_size=8)
    trainer.engine = Engine(change(trainer.policy), trainer.config.engine)
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        metrics = trainer.step()
    assert metrics["logprob/gap_max"] > 1e-3
    assert metrics["logprob/num_recomputed"] == 1
    assert f"first in: {place}. Ratios would not start at 1" in caplog.text
    # The update starts from the recomputed log-probs; the ratio to the engine's is shown as it is.
    assert metrics["kl/approx"] < 1e-8 and metrics["clip/fraction"] == 0
    assert metrics["ratio/first_minibatch_max_error"] > 1e-3


def test_checks_of_log_probs_can_be_loosened_and_left_out(task: SimpleNamespace) -> None:
    def metrics_with_other_engine(**settings: Any) -> dict[str, float]:
        trainer = task.make_trainer(**settings)
        trainer.engine = Engine(shifted_weights(trainer.policy), trainer.config.engine)
        return trainer.step()

    loose = metrics_with_other_engine(logprob_tolerance=100.0)
    assert loose["logprob/gap_max"] > 1e-3 and loose["logprob/num_recomputed"] == 0
    assert "logprob/gap_max" not in metrics_with_other_engine(num_logprob_checks=0)


@pytest.mark.parametrize("num_checks", [1, 3, 8])
def test_number_of_log_prob_checks(task: SimpleNamespace, num_checks: int) -> None:
    """A wrong log-prob in one response is seen when that response is among those recomputed."""
    trainer = task.make_trainer(num_logprob_checks=num_checks)
    rollout = task.catch_batch(trainer).rollout
    num_seen = 0
    for row in range(8):
        logprobs = rollout.rollout_logprobs.clone()
        logprobs[row, 0] += 0.5
        wrong = dataclasses.replace(rollout, rollout_logprobs=logprobs)
        gap, found = largest_gap(trainer.policy, wrong, trainer.config, 0)
        num_seen += gap > 0.4 and found == row
    assert num_seen == num_checks


def test_metrics_of_a_batch(task: SimpleNamespace) -> None:
    """Two responses worked out by hand; the first did not stop."""
    batch = task.catch_batch(task.make_trainer(rollout_batch_size=2, minibatch_size=2))
    mask = torch.tensor([[True, True], [True, False]])
    rollout = dataclasses.replace(
        batch.rollout, response_mask=mask, entropy=torch.tensor([[0.2, 0.4], [0.9, 0.0]]),
        finish_reasons=("length", "stop"))
    metrics = batch_metrics(dataclasses.replace(
        batch, rollout=rollout,
        # Of log-probs -1, -2, -.5 and the reference's -1.2, -1.9, -.9.
        kl_estimates=(torch.tensor([[0.2, -0.1], [0.4, 0.0]]), torch.zeros(2, 2),
                      torch.tensor([[0.01873075, 0.00517092], [0.07032005, 0.0]])),
        values=torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
        returns=torch.tensor([[1.0, 4.0], [4.0, 0.0]]),
        rewards=torch.tensor([[0.1, 0.5], [-0.2, 0.0]]),
        raw_advantages=torch.tensor([[0.0, 2.0], [1.0, 9.0]]),
        raw_scores=torch.tensor([1.0, 3.0]), scores=torch.tensor([-1.0, 3.0])), PPOConfig())
    assert metrics == {name: pytest.approx(value, abs=1e-6) for name, value in {
        "reward/score_mean": 2.0, "reward/score_std": 1.0, "reward/used_score_mean": 1.0,
            "reward/score_min": 1.0, "reward/score_max": 3.0, "reward/used_score_std": 2.0,
            "response/empty_share": 0.5, "response/most_common_share": 0.5,
        "reward/total_mean": 0.2, "kl/policy_ref": 0.25,
        "kl/policy_ref_k3": (0.01873075 + 0.00517092 + 0.07032005) / 2,
        "entropy/mean": 0.5, "response/length_mean": 1.5, "response/eos_rate": 0.5,
        "value/mean": 2.0, "value/return_mean": 3.0, "value/return_std": math.sqrt(2.0),
        # Errors 0, 2, 1: MSE 5/3, variance 2; spread of the errors sqrt(2/3).
        "value/explained_variance": 1 - 5 / 6, "advantage/std": math.sqrt(2 / 3)}.items()}


@pytest.mark.parametrize("settings", [{}, {"ptx_coef": 0.5, "ptx_ratio": 2.0,
                                           "entropy_coef": 0.1, "num_inner_epochs": 2}])
def test_microbatches_do_not_change_an_iteration(
    task: SimpleNamespace, settings: dict[str, Any]
) -> None:
    def weights_after_a_step(max_tokens: int) -> list[torch.Tensor]:
        trainer = task.make_trainer(inputs={"ptx": task.PTX}, max_tokens_per_microbatch=max_tokens,
                                    **settings)
        trainer.step()
        return [*task.weights_of(trainer.policy), *task.weights_of(trainer.critic)]

    whole = weights_after_a_step(8192)
    for max_tokens in (1, 17):
        for a, b in zip(whole, weights_after_a_step(max_tokens), strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm()) + 1e-9


def test_microbatches_do_not_change_gradients_in_float64(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(entropy_coef=0.1)
    batch = task.catch_batch(trainer)
    policy, critic = trainer.policy.double(), trainer.critic.double()
    with torch.no_grad():  # away from the sampling weights, so that ratios and clips are in play
        for p in [*policy.parameters(), *critic.parameters()]:
            p.add_(0.02 * torch.randn_like(p))

    def gradients(max_tokens: int) -> list[torch.Tensor]:
        config = PPOConfig(**{**vars_of(trainer.config), "max_tokens_per_microbatch": max_tokens})
        policy.zero_grad()
        critic.zero_grad()
        backward_policy(policy, batch, [5, 2, 7, 0], config)
        backward_critic(critic, batch, [5, 2, 7, 0], config)
        return [p.grad.clone() for p in [*policy.parameters(), *critic.parameters()]]

    whole = gradients(8192)
    for max_tokens in (1, 17):
        for a, b in zip(whole, gradients(max_tokens), strict=True):
            assert float((a - b).abs().max()) <= 1e-10 * max(1.0, float(a.abs().max()))


def vars_of(config: PPOConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_equal_seeds_give_equal_runs(task: SimpleNamespace) -> None:
    def run(seed: int) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
        trainer = task.make_trainer(inputs={"ptx": task.PTX}, seed=seed, ptx_coef=0.5)
        history = [trainer.step() for _ in range(3)]
        values = [{k: v for k, v in metrics.items() if not is_timing(k)}
                  for metrics in history]
        return task.weights_of(trainer.policy) + task.weights_of(trainer.critic), values

    first, second, other = run(3), run(3), run(4)
    assert task.equal(first[0], second[0]) and first[1] == second[1]
    assert not task.equal(first[0], other[0])


def test_the_seed_decides_prompts_and_tokens(task: SimpleNamespace) -> None:
    first, other = (task.catch_batch(task.make_trainer(seed=seed)) for seed in (3, 4))
    assert first.rollout.prompt_lens.tolist() != other.rollout.prompt_lens.tolist()
    first, other = (task.catch_batch(task.make_trainer(seed=seed, prompts=task.PROMPTS[:1]))
                    for seed in (3, 4))
    assert first.rollout.response_ids.tolist() != other.rollout.response_ids.tolist()


def test_rollouts_of_iterations_differ(task: SimpleNamespace) -> None:
    """With learning rates of next to nothing only the sampling seed tells iterations apart."""
    trainer = task.make_trainer(prompts=task.PROMPTS[:1], learning_rate=1e-30,
                                critic_learning_rate=1e-30)
    caught = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda *a, **k: caught.append(generate(*a, **k)) or caught[-1]
    trainer.step()
    trainer.step()
    assert caught[0].response_ids.tolist() != caught[1].response_ids.tolist()


def test_prompts_are_drawn_once_per_pass(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(rollout_batch_size=4, minibatch_size=4)
    seen: list[tuple[int, ...]] = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda prompts, *a, **k: (
        seen.extend(map(tuple, prompts)) or generate(prompts, *a, **k))
    for _ in range(3):
        trainer.step()
    everything = sorted(p.token_ids for p in task.PROMPTS)
    assert sorted(seen[:6]) == everything and sorted(seen[6:]) == everything
    assert seen[:6] != seen[6:]


def test_the_engine_is_told_whenever_weights_change(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(eval_steps=1, inputs={"eval_prompts": task.PROMPTS})
    events: list[str] = []

    def note(owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return original(*args, **kwargs)

        setattr(owner, name, noted)

    note(trainer.engine, "generate", "generate")
    note(trainer.engine, "weights_changed", "told")
    note(trainer.policy_learner.optimizer, "step", "changed")
    trainer.step()
    evaluation = ["told", "generate", "told"]  # the average goes in, and out again
    iteration = ["generate", "changed", "changed", "told"]
    assert events == [*evaluation, *iteration, *evaluation]


def test_a_stream_across_training_goes_on_from_the_weights_that_are_chosen(
    task: SimpleNamespace,
) -> None:
    """The average goes into the policy at the very end; no page of the last weights stays."""
    trainer = task.make_trainer(ema_decay=0.5, learning_rate=0.05)
    stream = trainer.engine.stream([2, 3], SamplingConfig(
        max_new_tokens=6, min_new_tokens=6, logprobs="raw"))
    taken = [next(stream) for _ in range(3)]
    trainer.train()
    *_, last = taken = [*taken, next(stream)]
    stream.close()
    token_ids = torch.tensor([2, 3, *(token.token_id for token in taken)])
    with torch.no_grad():
        hidden = trainer.policy.backbone(
            token_ids, torch.arange(6), PackedAttention(torch.tensor([0, 6]), 6))
        logprobs = (hidden @ trainer.policy.lm_head.weight.T).log_softmax(dim=1)
    assert last.logprob == pytest.approx(float(logprobs[4, last.token_id]), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_score_stops_before_it_reaches_the_weights(task: SimpleNamespace, bad: float) -> None:
    def scorer(rollout: Rollout) -> torch.Tensor:
        scores = task.score_even(rollout)
        scores[3] = bad
        return scores

    trainer = task.make_trainer(scorer=scorer)
    before = task.weights_of(trainer.policy)
    with pytest.raises(NumericsError, match=r"iteration 0: expected finite scores.*response 3 \(1 "
                                            r"of 8"):
        trainer.step()
    assert task.equal(before, task.weights_of(trainer.policy))


def test_a_bad_critic_is_named(task: SimpleNamespace) -> None:
    trainer = task.make_trainer()
    with torch.no_grad():
        trainer.critic.head.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="finite values, got NaN or infinity in response 0"):
        trainer.step()


@pytest.mark.parametrize(
    ("model", "quantity", "settings"),
    [("critic", "(loss/value|grad/critic_norm)", {"value_coef": 1e38,
                                                  "critic_max_grad_norm": None}),
     ("policy", "(loss/ptx|grad/policy_norm)", {"ptx_coef": 1e39})])
def test_a_bad_gradient_stops_before_the_step(
    task: SimpleNamespace, model: str, quantity: str, settings: dict[str, Any]
) -> None:
    trainer = task.make_trainer(inputs={"ptx": task.PTX}, **settings)
    before = task.weights_of(getattr(trainer, model))
    with pytest.raises(NumericsError, match=rf"iteration 0: expected finite .*got {quantity}.*"
                                            r"minibatch of responses \[\d"):
        trainer.step()
    assert task.equal(before, task.weights_of(getattr(trainer, model)))


def test_a_bad_held_out_score_is_named(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(
        scorer=lambda rollout: torch.full((rollout.batch_size,), float("nan")), eval_steps=1,
        inputs={"eval_prompts": task.PROMPTS})
    with pytest.raises(NumericsError, match=r"finite scores.*response 0 \(6 of 6 responses\)"):
        trainer.step()


def test_equal_scores_are_harmless(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(scorer=lambda rollout: torch.zeros(rollout.batch_size))
    metrics = trainer.step()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["reward/score_std"] == 0 and "kl/coef_per_score_std" not in metrics


def test_run_folder_gets_metrics_and_samples(task: SimpleNamespace, tmp_path: Path) -> None:
    settings = {"eval_steps": 2, "logging_steps": 2, "num_iterations": 3}
    config = PPOConfig(**{**vars_of(task.make_trainer().config), **settings})
    run = RunFolder(tmp_path / "run", config, stage="ppo")
    trainer = task.make_trainer(
        inputs={"run": run, "eval_prompts": task.PROMPTS, "ptx": task.PTX,
                "eval_ptx": task.PTX}, ptx_coef=0.1, **settings)
    seen = []
    trainer.train(SimpleNamespace(update=lambda step, metrics: seen.append(step)))
    run.finish()
    rows, timing, samples = (
        [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "timing.jsonl", "samples.jsonl"))
    assert seen == [1, 2, 3]
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert "eval/objective" in rows[0] and "loss/policy" not in rows[0]
    assert {"time/rollout_s", "time/scoring_s", "time/policy_update_s", "time/critic_update_s",
            "time/eval_s", "time/step_s", "throughput/tokens_per_s"} <= timing[0].keys()
    names = {name for row in [*rows, *timing] for name in row} - {"step"}
    assert names <= GLOSSARY.keys()
    assert EXPECTED_METRICS <= names
    assert [s["step"] for s in samples] == [0] * 4 + [2] * 4 + [3] * 4
    assert [s["prompt"] for s in samples[:4]] == [s["prompt"] for s in samples[8:]]
    assert all(s["response"] and "score" in s for s in samples)


EXPECTED_METRICS = {
    "reward/score_mean", "reward/score_std", "kl/policy_ref", "kl/policy_ref_k3", "entropy/mean",
    "kl/coef", "kl/coef_per_score_std", "clip/fraction", "clip/value_fraction", "kl/approx",
    "value/explained_variance", "response/length_mean", "response/eos_rate", "loss/ptx",
    "eval/ptx_loss", "grad/policy_norm", "grad/critic_norm", "lr/policy", "lr/critic", "value/mean",
    "value/return_mean", "advantage/std", "ratio/first_minibatch_mean", "logprob/gap_max",
    "ratio/effective_share",
}
