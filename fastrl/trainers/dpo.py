"""DPO and IPO: a policy from rankings, without a reward model and without rollouts.

The log-prob of a completion over the reference's, times beta, is its implicit reward; the policy
learns to give the better of two completions the larger one. K completions of a prompt are K
sequences of the packed batch, each read once however many pairs it is in. The reference's log-probs
are computed once, before the first step; where no reference is given it is the policy as it is
then, and no second model is needed. There is no dropout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastrl.alarms import Circumstances
from fastrl.checkpoints import State
from fastrl.checkpoints.saver import Saver
from fastrl.config import DPOConfig
from fastrl.errors import DataError
from fastrl.losses import dpo_loss
from fastrl.memory.measure import MemoryWatch, device_of, fitted
from fastrl.memory.shapes import shape_of_model
from fastrl.memory.stages import plan_dpo
from fastrl.metrics import PhaseTimer, RunFolder, peak_memory_gib
from fastrl.models.causal_lm import CausalLM
from fastrl.models.lora import adapt
from fastrl.optim import AdamW, Schedule
from fastrl.out_of_memory import PassBudget
from fastrl.packing import split_by_tokens
from fastrl.trainers.alarm_log import AlarmLog
from fastrl.trainers.budget import TokenBudget
from fastrl.trainers.common import (
    Progress,
    SilentProgress,
    accumulate,
    epoch_batches,
    mode,
    prepare_backbone,
    require_rows,
)
from fastrl.trainers.dpo_pairs import completion_logprobs, ranked_pairs
from fastrl.trainers.nonfinite import trace
from fastrl.trainers.rankings import (
    check_comparison,
    fit_comparisons,
    group_lengths,
    usable_rankings,
)
from fastrl.trainers.reward_report import has_pair
from fastrl.trainers.supervised_state import floats, load_supervised_state, supervised_state
from fastrl.types import Comparison


@dataclass(frozen=True, slots=True)
class DPOExample:
    """A ranking, and what the reference says of it."""

    comparison: Comparison
    ref_logprobs: tuple[float, ...]
    """K log-probs as `completion_logprobs` gives them; zeros without a reference."""


class DPOTrainer:
    """Trains a policy to prefer what people preferred, near a reference.

    Args:
        config: Every setting.
        policy: Trained in place.
        train: Rankings. Those without a pair of different ranks are dropped and counted in
            `num_without_pair`; prompts that are too long lose their beginning (`num_truncated`);
            completions that leave no room for a prompt drop the ranking (`num_too_long`).
        reference: Read once, here, and not kept; None takes the policy as it is now.
        eval: Held-out rankings for `evaluate` during and after training.
        run: Where metrics go; None writes nothing.
    Raises:
        DataError: when no ranking is left to train on or, where `eval` is given, to evaluate on;
            when a ranking is malformed.
    Source: Rafailov et al. 2023 (arXiv 2305.18290); all pairs of a prompt weigh as one ranking, as
        in Ouyang et al. 2022 (arXiv 2203.02155), equation 1.
    """

    def __init__(
        self,
        config: DPOConfig,
        policy: CausalLM,
        train: Sequence[Comparison],
        *,
        reference: CausalLM | None = None,
        eval: Sequence[Comparison] = (),
        run: RunFolder | None = None,
    ) -> None:
        self.policy, self.run = policy, run
        adapt(policy, config)
        for index, comparison in enumerate((*train, *eval)):
            check_comparison(comparison, index)
            if min(map(len, comparison.completions)) == 0:
                raise DataError(f"comparison {index}: expected completions of at least one token, "
                                "got an empty one; end completions with an end-of-text token")
        usable = usable_rankings("DPO", train, config.max_seq_tokens)
        fitting, self.num_truncated = usable.comparisons, usable.num_truncated
        self.num_without_pair, self.num_too_long = usable.num_without_pair, usable.num_too_long
        held_out = [c for c in fit_comparisons(eval, config.max_seq_tokens)[0] if has_pair(c)]
        if eval:
            require_rows(held_out, "held-out rankings with a pair of different ranks")
        models = [policy] if reference is None else [policy, reference]
        second = None if reference is None else shape_of_model("policy", reference)
        device = device_of(policy, config)
        plan = plan_dpo(config, shape_of_model("policy", policy), device, reference=second,
                        longest=max(group_lengths((*fitting, *held_out), config.share_prefix)))
        self.memory = MemoryWatch(plan, policy.lm_head.weight.device,
                                  (p for model in models for p in model.parameters()), run)
        self.config = config = fitted(config, plan, device.type)
        self.passes = PassBudget(config.max_tokens_per_microbatch)
        self.examples = self._with_reference(models[-1], fitting)
        self.eval = self._with_reference(models[-1], held_out)
        self.steps_per_epoch = -(-len(fitting) // config.batch_size)
        self.num_steps = config.max_steps or self.steps_per_epoch * config.num_epochs
        self.budget = TokenBudget(config)
        self.schedule = Schedule.from_config(config, self.num_steps)
        prepare_backbone(policy, config)
        self.optimizer = AdamW.from_config(policy.parameters(), config)
        self.num_finished = 0
        self.alarms = AlarmLog(self.config, Circumstances(num_steps=self.num_steps), run)

    def _with_reference(
        self, reference: CausalLM, comparisons: Sequence[Comparison]
    ) -> list[DPOExample]:
        """Rankings with the log-probs of the reference, from one forward pass over each."""
        if self.config.reference == "none":
            return [DPOExample(c, (0.0,) * len(c.completions)) for c in comparisons]
        lengths = group_lengths(comparisons, self.config.share_prefix)

        def attempt(max_tokens: int) -> list[DPOExample]:
            examples: list[DPOExample] = []
            for rows in split_by_tokens(lengths, max_tokens):
                group = [comparisons[i] for i in rows]
                logprobs = iter(self._logprobs(reference, group).tolist())
                examples.extend(DPOExample(c, tuple(next(logprobs) for _ in c.completions))
                                for c in group)
            return examples

        with self.memory.phase("scoring"), mode(reference, train=False), torch.no_grad():
            return self.passes.run(attempt, lengths, "reference log-probs")

    def _logprobs(self, model: CausalLM, comparisons: Sequence[Comparison]) -> Tensor:
        return completion_logprobs(model, comparisons, is_mean=self.config.loss_type == "ipo",
                                   share_prefix=self.config.share_prefix)

    @property
    def dropped_share(self) -> float:
        """Training rankings that were dropped, or lost the beginning of their prompt."""
        dropped = self.num_without_pair + self.num_too_long
        return (dropped + self.num_truncated) / (dropped + len(self.examples))

    def step(self) -> dict[str, float]:
        """One optimiser step over `batch_size` prompts; returns its metrics."""
        with self.memory.phase("update"):
            metrics = self._step()
        return metrics | self.memory.metrics()

    def _step(self) -> dict[str, float]:
        config, timer, number = self.config, PhaseTimer(), self.num_finished + 1
        epoch, index = divmod(self.num_finished, self.steps_per_epoch)
        rows = epoch_batches(len(self.examples), config.batch_size, config.seed, epoch)[index]
        batch = [self.examples[i] for i in rows]
        learning_rate = self.schedule(self.num_finished)
        lengths = group_lengths([example.comparison for example in batch])
        metrics = self.budget.step(number, partial(self.backward, batch), self.optimizer, lengths,
                                   learning_rate, partial(self._find, batch))
        self.num_finished = number
        if number == 1:
            metrics["data/dropped_share"] = self.dropped_share
        return metrics | {
            "lr/model": learning_rate,
            "data/epoch": number / self.steps_per_epoch,
            "memory/peak_gib": peak_memory_gib(next(self.policy.parameters()).device),
        } | timer.metrics(sum(lengths))

    def _find(self, batch: Sequence[DPOExample]) -> str:
        """Where a NaN or an infinity of a minibatch comes from."""
        return trace(self.policy, [e.comparison.prompt_ids for e in batch],
                     lambda i: self.backward(batch[i:i + 1]))

    def train(self, progress: Progress | None = None) -> None:
        """Every step that is left, with evaluations."""
        progress = progress or SilentProgress()
        with Saver(self.config, self.run, self.state) as saver:
            while self.num_finished < self.num_steps:
                metrics = self.step()
                step, every = self.num_finished, self.config.eval_steps
                evaluate = bool(self.eval) and (step == self.num_steps
                                                or (every is not None and step % every == 0))
                if evaluate:
                    timer = PhaseTimer()
                    with timer.phase("eval"):
                        metrics |= self.evaluate()
                    metrics["time/eval_s"] = timer.metrics()["time/eval_s"]
                due = step % self.config.logging_steps == 0 or step == self.num_steps or evaluate
                metrics |= self.alarms.look(step, metrics)
                if self.run is not None and due:
                    self.run.log(step, metrics)
                self.alarms.stop_if_asked(step)
                progress.update(step, metrics)
                saver.after_step(step)

    def state(self) -> State:
        """All that the steps that are left depend on; tensors by reference."""
        return supervised_state(self, self.policy, self._reference_state())

    def load_state(self, state: State) -> None:
        """Go on where `state` was taken, by a trainer of the same model, settings and data.

        Raises:
            CheckpointError: when the state does not fit; nothing has changed then.
        """
        reference = self._reference_state()
        load_supervised_state("DPO", self, self.policy, reference, state)
        logprobs = iter(reference.tensors["ref_logprobs"].tolist())
        for examples in (self.examples, self.eval):
            examples[:] = [replace(e, ref_logprobs=tuple(next(logprobs) for _ in e.ref_logprobs))
                           for e in examples]

    def _reference_state(self) -> State:
        """What the reference said: passes of another size would round it otherwise."""
        return State({"ref_logprobs": floats([
            value for e in (*self.examples, *self.eval) for value in e.ref_logprobs])})

    def backward(
        self, batch: Sequence[DPOExample], config: DPOConfig | None = None
    ) -> dict[str, float]:
        """Add the gradient of a minibatch's loss to the policy; return its metrics.

            loss = mean over prompts of the mean over their pairs of dpo_loss

        Args:
            config: Its token budget counts; None: the trainer's.
        """
        config = config or self.config
        parts: list[dict[str, float]] = []

        def share(rows: list[int]) -> Tensor:
            loss, metrics = self._loss([batch[i] for i in rows], len(batch))
            parts.append(metrics)
            return loss

        with mode(self.policy, train=False):
            accumulate(group_lengths([example.comparison for example in batch],
                                     config.share_prefix),
                       config.max_tokens_per_microbatch, share)
        return _sum_by_name(parts)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The metrics of the held-out rankings under names of their own; empty without any."""
        lengths = group_lengths([e.comparison for e in self.eval], self.config.share_prefix)

        def attempt(max_tokens: int) -> list[dict[str, float]]:
            return [self._loss([self.eval[i] for i in rows], len(self.eval))[1]
                    for rows in split_by_tokens(lengths, max_tokens)]

        with mode(self.policy, train=False):
            parts = self.passes.run(attempt, lengths, "held-out loss")
        return {f"{name}_eval": value for name, value in _sum_by_name(parts).items()}

    def _loss(
        self, examples: Sequence[DPOExample], num_prompts: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The share of `examples` in the loss of `num_prompts` prompts, and in its metrics."""
        config = self.config
        logprobs = self._logprobs(self.policy, [example.comparison for example in examples])
        ref_logprobs = torch.tensor([value for e in examples for value in e.ref_logprobs],
                                    dtype=logprobs.dtype, device=logprobs.device)
        pairs, weights = ranked_pairs([example.comparison for example in examples])
        better, worse = torch.tensor(pairs, device=logprobs.device).T
        weight = torch.tensor(weights, dtype=logprobs.dtype, device=logprobs.device) / num_prompts
        losses, margins = dpo_loss(
            logprobs[better], logprobs[worse], ref_logprobs[better], ref_logprobs[worse],
            dpo_beta=config.dpo_beta, loss_type=config.loss_type,
            label_smoothing=config.label_smoothing)
        loss = (weight * losses).sum()
        taken = logprobs.detach()
        rewards = config.dpo_beta * (taken - ref_logprobs)
        correct = (margins > 0).to(weight.dtype) + 0.5 * (margins == 0)
        columns = {
            "loss/dpo": losses.detach(), "reward/accuracy": correct, "reward/margin_mean": margins,
            "reward/chosen_mean": rewards[better], "reward/rejected_mean": rewards[worse],
            "logprob/chosen_mean": taken[better], "logprob/rejected_mean": taken[worse],
        }
        totals = (weight * torch.stack(list(columns.values()))).sum(dim=1).tolist()
        return loss, dict(zip(columns, totals, strict=True))


def _sum_by_name(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums of shares of one whole; empty without any."""
    return {name: math.fsum(part[name] for part in parts) for name in parts[0]} if parts else {}
