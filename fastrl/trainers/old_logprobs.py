"""Are the engine's log-probs those of the update? A sample of rows says so, every iteration."""

import logging

import torch
from torch import Tensor

from fastrl.config import PPOConfig
from fastrl.engine import Engine
from fastrl.engine.difference import first_difference
from fastrl.models.causal_lm import CausalLM
from fastrl.ops import linear_logprobs
from fastrl.out_of_memory import run_in_passes
from fastrl.packing import predict_rows
from fastrl.trainers.common import derive_seed, epoch_permutation, packed_forward
from fastrl.types import Rollout

logger = logging.getLogger("fastrl")

GAP_WARNING = (
    "iteration %d: log-probs of the engine and of the update's forward differ by up to %.2g on the "
    "same tokens and weights (logprob_tolerance %.2g), first in: %s. Ratios would not start at 1, "
    "so all old log-probs of this iteration are recomputed. Usual causes: 16-bit weights, another "
    "attention kernel in the engine, engine.exact off, weights changed without "
    "engine.weights_changed()"
)


@torch.no_grad()
def update_logprobs(policy: CausalLM, rollout: Rollout, config: PPOConfig) -> Tensor:
    """[B, T] float32: log-probs of the responses' tokens by the forward of the update."""
    mask = rollout.response_mask
    logprobs = torch.zeros(mask.shape, device=mask.device)
    sequences = [rollout.sequence(i) for i in range(rollout.batch_size)]
    prompt_lens = rollout.prompt_lens.tolist()
    prompts = [s[:n] for s, n in zip(sequences, prompt_lens, strict=True)]

    def run(rows: list[int]) -> None:
        hidden, packed = packed_forward(
            policy, [sequences[i] for i in rows], [prompt_lens[i] for i in rows],
            share_prefix=config.share_prefix)
        sources, targets = predict_rows(packed.is_response, packed)
        taken, _ = policy.lm_head(hidden[sources], linear_logprobs, packed.token_ids[targets],
                                  temperature=config.sampling.temperature)
        part = torch.zeros_like(logprobs[rows])
        part[mask[rows]] = taken.float()
        logprobs[rows] = part

    run_in_passes([len(s) for s in sequences], config.max_tokens_per_microbatch, run,
                  "recomputed log-probs", prompts if config.share_prefix else None)
    return logprobs


def largest_gap(
    policy: CausalLM, rollout: Rollout, config: PPOConfig, iteration: int
) -> tuple[float, int]:
    """Largest difference between the engine's log-probs and the update's, and the row that has it.

    Args:
        policy: The weights that made the rollout.
        iteration: Chooses which `num_logprob_checks` responses are recomputed.
    """
    seed = derive_seed(config.seed, "logprob_checks")
    rows = epoch_permutation(rollout.batch_size, seed, iteration)[:config.num_logprob_checks]
    part = rollout.select(rows)
    gaps = (update_logprobs(policy, part, config) - part.rollout_logprobs).abs().amax(dim=1)
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
        seed=derive_seed(config.seed, "rollout", iteration))
    logger.warning(GAP_WARNING, iteration, gap, tolerance, place)
