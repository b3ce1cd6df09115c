"""Held-out prompts answered with the weights that would be saved: score, log, keep the best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from fastrl.config import PPOConfig
from fastrl.engine import Engine
from fastrl.memory.residents import Residents
from fastrl.metrics import RunFolder
from fastrl.models.causal_lm import CausalLM
from fastrl.out_of_memory import PassBudget, call_again
from fastrl.rewards import Scorer, TextDecoder, decode_response, score_metrics
from fastrl.trainers.common import derive_seed, evaluate_token_loss
from fastrl.trainers.old_logprobs import update_logprobs
from fastrl.trainers.ppo_checks import check_rollout_finite
from fastrl.trainers.ppo_trunks import reference_part
from fastrl.trainers.ppo_update import eval_metrics
from fastrl.trainers.ppo_weights import KeptWeights
from fastrl.types import Prompt, Rollout, TokenExample
from fastrl.watch import RewardWatch

Result = TypeVar("Result")

NUM_LOGGED_SAMPLES = 4
"""Held-out prompts whose responses are written out at every evaluation."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation reads; `run` does it.

    Prompts and random numbers are the same every time, so samples can be put side by side.
    """

    config: PPOConfig
    engine: Engine
    """Over `policy`."""
    policy: CausalLM
    reference: CausalLM | None
    scorer: Scorer
    weights: KeptWeights
    """Says which weights are judged, and keeps the best."""
    residents: Residents
    prompts: Sequence[Prompt]
    ptx: Sequence[TokenExample]
    """Held-out windows of pretraining text."""
    folder: RunFolder | None
    encoder: TextDecoder | None
    passes: PassBudget
    """Of scoring."""
    watch: RewardWatch | None = None
    """Looks for signs of reward hacking."""

    def run(self, iteration: int) -> dict[str, float]:
        """Answer, score, log and keep.

        Returns:
            `eval/` metrics; empty without held-out prompts.
        Raises:
            NumericsError: when a score or a log-prob is not finite.
        """
        if not self.prompts:
            return {}
        with self.weights.for_evaluation(self.residents):
            rollout, raw_scores, metrics = self._read(iteration)
            call_again(lambda: self.weights.offer(iteration, metrics["eval/objective"]),
                       "copy of the best weights", "set keep_best to false")
        self.engine.weights_changed()
        call_again(partial(self._log_samples, iteration, rollout, raw_scores),
                   "samples of an evaluation")
        return metrics

    def _read(self, iteration: int) -> tuple[Rollout, Tensor, dict[str, float]]:
        """Responses, their scores, and what they say of the weights that are in the policy."""
        config = self.config
        self.engine.weights_changed()
        rollout = self._compute(lambda: self.engine.generate(
            [p.token_ids for p in self.prompts], config.sampling,
            seed=derive_seed(config.seed, "eval")), "policy", "kv_cache")
        ref_logprobs = None
        if self.reference is not None:
            ref_logprobs = self._compute(partial(update_logprobs, self.reference, rollout, config,
                                                 self.passes), reference_part(config))
        raw_scores = self._compute(lambda: self.scorer(rollout), "reward_model")
        gold = None
        if self.watch is not None and self.watch.gold is not None:
            gold = self._compute(partial(self.watch.gold, rollout), "reward_model")

        def measure() -> dict[str, float]:
            check_rollout_finite(iteration, rollout, scores=raw_scores, gold_scores=gold,
                                 ref_logprobs=ref_logprobs)
            metrics = eval_metrics(rollout, ref_logprobs, raw_scores, config)
            metrics |= score_metrics(self.scorer, "eval/reward_")
            if self.ptx:
                metrics["eval/ptx_loss"] = evaluate_token_loss(self.policy, self.ptx, self.passes)
            return metrics

        metrics = self._compute(measure, "policy")  # which has to be there at the end
        if self.watch is not None:
            metrics |= self.watch.observe(
                iteration, rollout, raw_scores, gold, metrics,
                lambda start: self._compute(partial(update_logprobs, self.policy, start, config,
                                                    self.passes), "policy"))
        return rollout, raw_scores, metrics

    def _compute(self, work: Callable[[], Result], *parts: str) -> Result:
        """What `work` returns in a part of the phase. It changes nothing, so it may be done again.
        """
        return call_again(
            work, f"evaluation ({', '.join(parts)}) of {len(self.prompts)} held-out responses",
            "lower num_eval_prompts, max_prompt_tokens or max_new_tokens",
            partial(self.residents.phase, "evaluation", *parts))

    def _log_samples(self, iteration: int, rollout: Rollout, raw_scores: Tensor) -> None:
        """Write the first responses to the run folder; token ids without an encoder."""
        if self.folder is None:
            return
        self.folder.log_samples(iteration, [
            {
                "prompt": self.prompts[i].text,
                "response": " ".join(map(str, rollout.response(i))) if self.encoder is None
                else decode_response(rollout, i, self.encoder),
                "score": float(raw_scores[i]),
                "finish_reason": rollout.finish_reasons[i],
            }
            for i in range(min(NUM_LOGGED_SAMPLES, rollout.batch_size))
        ])
