"""A PPO task small enough to run in milliseconds, and ways to look inside a trainer."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.metrics import PhaseTimer
from fastrl.models.causal_lm import CausalLM, ScalarModel, scalar_from_causal
from fastrl.models.decoder import DecoderConfig, new_decoder
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_update import PPOBatch
from fastrl.types import Prompt, Rollout, TokenExample

EOS = 1
VOCABULARY = 13
PROMPTS = [Prompt(ids, " ".join(map(str, ids))) for ids in
           ((2, 3), (4,), (6, 7, 8), (9, 10), (3, 2, 4, 6), (11,))]
PTX = [TokenExample(tuple(range(2 + i, 8 + i)), (False, *[True] * 5)) for i in range(5)]
SETTINGS: dict[str, Any] = {
    "num_iterations": 3, "rollout_batch_size": 8, "minibatch_size": 4, "warmup_steps": 0,
    "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "eval_steps": None,
    "sampling": SamplingConfig(max_new_tokens=5), "missing_eos_penalty": None,
    "engine": EngineConfig(page_size=4, max_batch_size=8),
}


def tiny_model(architecture: str = "llama", vocab_size: int = VOCABULARY,
               seed: int = 0, max_positions: int = 32) -> CausalLM:
    """A random decoder with one layer and weights large enough for tokens to differ."""
    switches = {} if architecture == "llama" else {
        "norm": "layer", "activation": "gelu_new", "gated_mlp": False, "rotary_dim": 0,
        "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "tie_embeddings": True}
    return new_decoder(DecoderConfig(**{
        "family": architecture, "vocab_size": vocab_size, "hidden_size": 16, "num_layers": 1,
        "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8,
        "intermediate_size": 24, "max_positions": max_positions, "initializer_range": 0.4,
        "eos_token_ids": (EOS,), **switches}), seed=seed)


def tiny_critic(policy: CausalLM, seed: int = 1) -> ScalarModel:
    """A critic with a random head on a copy of the policy's trunk."""
    return scalar_from_causal(policy, seed)


def score_even(rollout: Rollout) -> Tensor:
    """Share of a response's tokens that are even."""
    even = (rollout.response_ids % 2 == 0) & rollout.response_mask
    return even.sum(dim=1) / rollout.response_lens


def make_trainer(
    policy: CausalLM | None = None,
    *,
    reference: CausalLM | None = None,
    critic: ScalarModel | None = None,
    scorer: Callable[[Rollout], Tensor] = score_even,
    prompts: Sequence[Prompt] = PROMPTS,
    inputs: dict[str, Any] | None = None,
    **settings: Any,
) -> PPOTrainer:
    """A trainer of the tiny task; `inputs` are PPOTrainer's keyword arguments."""
    policy, given = policy or tiny_model(), {**SETTINGS, **settings}
    if given.get("advantage", "gae") != "gae" and "critic_learning_rate" not in settings:
        del given["critic_learning_rate"]
    config = PPOConfig(**given)
    if critic is None and config.has_critic:
        critic = tiny_critic(policy)
    return PPOTrainer(config, policy, reference or copy.deepcopy(policy), critic, scorer, prompts,
                      **(inputs or {}))


def weights_of(model: torch.nn.Module) -> list[Tensor]:
    """Copies of all weights."""
    return [p.detach().clone() for p in model.parameters()]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """True when two lists of tensors have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def catch_batch(trainer: PPOTrainer) -> PPOBatch:
    """Run an iteration without its update and return what the update would have learned from."""
    caught: list[PPOBatch] = []

    def catch(batch: PPOBatch, timer: PhaseTimer) -> dict[str, float]:
        caught.append(batch)
        return {}

    trainer._update = catch  # type: ignore[method-assign]
    trainer.step()
    return caught[0]


def catch_gradients(trainer: PPOTrainer) -> list[dict[str, list[Tensor]]]:
    """From now on, copies of all gradients at every optimiser step; weights stay as they are."""
    steps: list[dict[str, list[Tensor]]] = []
    for name in ("policy", "critic"):
        model, learner = getattr(trainer, name), getattr(trainer, f"{name}_learner")
        if learner is None:
            continue

        def record(learning_rate: float, scale: Tensor | None, name: str = name,
                   model: Any = model) -> None:
            factor = 1.0 if scale is None else scale
            steps.append({name: [torch.zeros_like(p) if p.grad is None else factor * p.grad
                                 for p in model.parameters()]})

        learner.optimizer.step = record
    return steps
