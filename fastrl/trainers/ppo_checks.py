"""What PPO refuses before it starts, and the numbers it refuses while it runs."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastrl.config import PPOConfig
from fastrl.errors import ConfigError, DataError, ModelError, NumericsError
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.lora import trained_parameters
from fastrl.types import Prompt, Rollout, TokenExample

logger = logging.getLogger("fastrl")

MAX_PADDING_ROWS = 512
"""Embedding rows that models of one tokenizer may differ by: sizes are often rounded up."""


def check_models(
    models: Mapping[str, CausalLM | ScalarModel], critic_weights: Sequence[Tensor]
) -> None:
    """Refuse models that read other tokens than the policy, or share weights that are trained.

    Args:
        models: By name: "policy", "critic", perhaps "reference" and more scalar models.
        critic_weights: What the critic has to have alone: not a trunk that it shares.
    Raises:
        ModelError: when the vocabularies cannot belong to one tokenizer. Critic and reward model
            may have up to 512 more embedding rows than the policy.
        ConfigError: when a model holds a tensor that belongs to the policy or the critic.
    """
    vocab_size = models["policy"].spec.vocab_size
    weights: dict[str, Sequence[Tensor]] = {
        name: list(model.parameters()) for name, model in models.items()}
    if "critic" in models:
        weights["critic"] = critic_weights
    trained = {id(p): name for name, own in (("policy", trained_parameters(models["policy"])),
                                             ("critic", critic_weights)) for p in own}
    for name, model in models.items():
        spare_rows = 0 if name == "reference" else MAX_PADDING_ROWS
        if not 0 <= model.spec.vocab_size - vocab_size <= spare_rows:
            raise ModelError(
                f"PPO: expected {name} and policy to read the same tokens, got vocabularies of "
                f"{model.spec.vocab_size} and {vocab_size}; use models of one tokenizer"
            )
        owner = next((trained[id(p)] for p in weights[name] if id(p) in trained), name)
        if owner != name:
            raise ConfigError(
                f"PPO: expected {name} to have weights of its own, got those of the {owner}, which "
                f"change in training; pass copy.deepcopy({owner})"
            )


def check_settings(
    config: PPOConfig, policy: CausalLM, reference: CausalLM | None, critic: ScalarModel | None,
    ptx: Sequence[TokenExample],
) -> None:
    """Refuse settings that cannot work with these models and data.

    Raises:
        ConfigError: when a reference or a critic is missing, or given for nothing; when ptx is on
            without text, or no response could ever stop although responses that do not stop get a
            penalty instead of their score.
    """
    if (config.reference != "copy") != (reference is None):
        raise ConfigError(
            f"reference: expected {'None' if config.reference != 'copy' else 'a model'} for "
            f"reference {config.reference!r}, got {'None' if reference is None else 'a model'}; "
            f"pass the other, or change reference"
        )
    if config.has_critic == (critic is None):
        raise ConfigError(
            f"critic: expected {'a model' if config.has_critic else 'None'} for advantage "
            f"{config.advantage!r}, got {'None' if critic is None else 'a model'}; pass the other, "
            f"or change advantage"
        )
    if config.ptx_coef > 0 and (not ptx or round(config.ptx_ratio * config.minibatch_size) < 1):
        raise ConfigError(
            f"ptx_coef: expected pretraining windows for ptx_coef {config.ptx_coef}, got "
            f"{len(ptx)} windows and ptx_ratio {config.ptx_ratio}; pass ptx and a ratio that gives "
            f"at least one window per minibatch, or set ptx_coef to 0"
        )
    stops = config.sampling.stop_token_ids
    can_stop = config.sampling.stop_strings or (policy.spec.eos_token_ids if stops is None
                                                else stops)
    if config.missing_eos_penalty is not None and not can_stop:
        raise ConfigError(
            "missing_eos_penalty: expected a way for responses to stop, got a model without "
            "end-of-text token and no stop tokens or strings, so that every response would be "
            "penalised; set sampling.stop_token_ids, or missing_eos_penalty to null"
        )


def fit_prompts(
    prompts: Sequence[Prompt],
    config: PPOConfig,
    models: Mapping[str, CausalLM | ScalarModel],
    what: str,
) -> list[Prompt]:
    """The prompts of at most `max_prompt_tokens`; the others are dropped and counted in the log.

    Raises:
        DataError: when none is left, or one is empty or has ids outside the vocabulary.
        ConfigError: when a prompt and its response do not fit into a model's positions.
    """
    kept = [p for p in prompts if len(p.token_ids) <= config.max_prompt_tokens]
    if len(kept) < len(prompts):
        logger.warning("%s: dropped %d of %d that are longer than max_prompt_tokens (%d)",
                       what, len(prompts) - len(kept), len(prompts), config.max_prompt_tokens)
    if not kept:
        raise DataError(
            f"{what}: expected at least one of at most max_prompt_tokens "
            f"({config.max_prompt_tokens}) tokens, got none out of {len(prompts)}; raise "
            f"max_prompt_tokens or give shorter prompts"
        )
    vocab_size = models["policy"].spec.vocab_size
    for number, prompt in enumerate(kept):
        if not prompt.token_ids or not 0 <= min(prompt.token_ids) <= max(
            prompt.token_ids
        ) < vocab_size:
            raise DataError(
                f"{what}: expected prompt {number} to have tokens below the vocabulary size "
                f"{vocab_size}, got {list(prompt.token_ids[:8])}; encode it with the model's own "
                f"tokenizer"
            )
    needed = max(len(p.token_ids) for p in kept) + config.sampling.max_new_tokens
    for name, model in models.items():
        if needed > model.spec.max_positions:
            raise ConfigError(
                f"{what}: expected prompt and response to fit into {name}'s "
                f"{model.spec.max_positions} positions, got {needed} (longest prompt plus "
                f"max_new_tokens {config.sampling.max_new_tokens}); lower max_prompt_tokens or "
                f"max_new_tokens"
            )
    return kept


class NonFinite(NumericsError):
    """A NaN or an infinity of one response.

    Args:
        quantity: Whose name it is.
        row: The first response that has it.
        reason: In words.
    """

    def __init__(self, quantity: str, row: int, reason: str) -> None:
        super().__init__(f"{reason}; weights are those of the iteration before. Look at the scorer "
                         "for scores, at learning rates and max_grad_norm otherwise")
        self.quantity, self.row, self.reason = quantity, row, reason


def check_rollout_finite(
    iteration: int, rollout: Rollout, **quantities: Tensor | None
) -> None:
    """Stop at the first response with a NaN or an infinity, before anything learns from it.

    Args:
        iteration: For the message.
        rollout: The responses, for the message.
        quantities: Name -> [B] or [B, T] tensor; None is left out.
    Raises:
        NonFinite: names the iteration, the quantity and the response.
    """
    for name, tensor in quantities.items():
        if tensor is None:
            continue
        bad = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise NonFinite(name, row, (
                f"iteration {iteration}: expected finite {name}, got NaN or infinity in response "
                f"{row} ({int(bad.sum())} of {len(tensor)} responses), which begins with tokens "
                f"{rollout.response(row)[:8]} after prompt tokens "
                f"{rollout.sequence(row)[:8]}"
            ))
