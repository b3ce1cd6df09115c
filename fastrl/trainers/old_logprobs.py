"""Are the engine's log-probs those of the update? A sample of rows says so, every iteration."""

import logging

from torch import Tensor

from fastrl.config import PPOConfig
from fastrl.engine import Engine
from fastrl.engine.difference import first_difference
from fastrl.models.causal_lm import CausalLM
from fastrl.models.scoring import response_logprobs
from fastrl.out_of_memory import PassBudget
from fastrl.trainers.common import derive_seed, epoch_permutation
from fastrl.types import Rollout

logger = logging.getLogger("fastrl")

GAP_WARNING = (
    "iteration %d: log-probs of the engine and of the update's forward differ by up to %.2g on the "
    "same tokens and weights (logprob_tolerance %.2g), first in: %s. Ratios would not start at 1, "
    "so all old log-probs of this iteration are recomputed. Usual causes: 16-bit weights, another "
    "attention kernel in the engine, engine.exact off, weights changed without "
    "engine.weights_changed()"
)


def update_logprobs(
    policy: CausalLM, rollout: Rollout, config: PPOConfig, passes: PassBudget | None = None
) -> Tensor:
    """[B, T] float32: log-probs of the responses' tokens by packed passes, as the update makes.

    Args:
        passes: Budget of the run; None: that of the config.
    """
    logprobs, _ = response_logprobs(
        policy, rollout, config.sampling.temperature, passes or config.max_tokens_per_microbatch,
        share_prefix=config.share_prefix)
    return logprobs


def largest_gap(
    policy: CausalLM, rollout: Rollout, config: PPOConfig, iteration: int,
    passes: PassBudget | None = None,
) -> tuple[float, int]:
    """Largest difference between the engine's log-probs and the update's, and the row that has it.

    Args:
        policy: The weights that made the rollout.
        iteration: Chooses which `num_logprob_checks` responses are recomputed.
        passes: As `update_logprobs` takes it.
    """
    seed = derive_seed(config.seed, "logprob_checks")
    rows = epoch_permutation(rollout.batch_size, seed, iteration)[:config.num_logprob_checks]
    part = rollout.select(rows)
    again = update_logprobs(policy, part, config, passes)
    gaps = (again - part.rollout_logprobs).abs().amax(dim=1)
    largest = int(gaps.argmax())  # of NaN: the first
    return float(gaps[largest]), rows[largest]


def warn_of_gap(
    engine: Engine, policy: CausalLM, rollout: Rollout, config: PPOConfig, iteration: int,
    gap: float, row: int,
) -> None:
    """Say where engine and update part, on the response `row` drawn again."""
    tolerance = config.logprob_tolerance
    prompt = rollout.sequence(row)[:int(rollout.prompt_lens[row])]
    place = first_difference(
        engine, policy, prompt, config.sampling, tolerance=tolerance, request_id=row,
        seed=derive_seed(config.seed, "rollout", iteration),
        num_samples=config.num_samples_per_prompt, share_prefix=config.share_prefix)
    logger.warning(GAP_WARNING, iteration, gap, tolerance, place)
