"""Reward models from rankings: all pairs of a prompt in one batch element, one forward each.

K completions of a prompt are K sequences of the packed batch; the C(K, 2) pairs are formed from
their K scores. The completions of one prompt always share a microbatch (a prompt that alone exceeds
the token budget is a microbatch of its own), so the token budget never changes loss or gradients.
There is no dropout.
"""

import logging
import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor

from fastrl.alarms import Circumstances
from fastrl.checkpoints import State
from fastrl.checkpoints.saver import Saver
from fastrl.config import RewardConfig
from fastrl.memory.measure import MemoryWatch, device_of, fitted
from fastrl.memory.shapes import shape_of_model
from fastrl.memory.stages import plan_reward
from fastrl.metrics import PhaseTimer, RunFolder, peak_memory_gib
from fastrl.models.causal_lm import ScalarModel
from fastrl.models.lora import adapt
from fastrl.models.scoring import sequence_scores
from fastrl.ops import RankingStats, ranking_loss
from fastrl.optim import AdamW, Schedule
from fastrl.out_of_memory import PassBudget
from fastrl.trainers.alarm_log import AlarmLog
from fastrl.trainers.budget import TokenBudget
from fastrl.trainers.common import (
    Progress,
    SilentProgress,
    accumulate,
    epoch_batches,
    mode,
    packed_forward,
    prepare_backbone,
    require_rows,
)
from fastrl.trainers.nonfinite import trace
from fastrl.trainers.rankings import (
    check_comparison,
    fit_comparisons,
    group_lengths,
    prompted_sequences,
    usable_rankings,
)
from fastrl.trainers.reward_report import RewardReport, build_report, has_pair
from fastrl.trainers.supervised_state import load_supervised_state, supervised_state
from fastrl.types import Comparison, TokenExample

logger = logging.getLogger("fastrl")


class RewardTrainer:
    """Trains a scalar model to order completions as people ranked them.

    Args:
        config: Every setting.
        model: Trained in place; its head's bias is set at the end.
        train: Rankings. Those without a pair of different ranks are dropped and counted in
            `num_without_pair`; prompts that are too long lose their beginning (`num_truncated`);
            completions that leave no room for a prompt drop the ranking (`num_too_long`).
        eval: Held-out rankings for `evaluate` during and after training.
        demonstrations: Prompt and completion in one example; they get mean reward 0.
        run: Where metrics and the report go; None writes nothing.
    Raises:
        DataError: when no ranking is left to train on or, where `eval` is given, to evaluate on;
            when a ranking is malformed.
    Source: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5, equation 1, and appendix C.2.
    """

    def __init__(
        self,
        config: RewardConfig,
        model: ScalarModel,
        train: Sequence[Comparison],
        *,
        eval: Sequence[Comparison] = (),
        demonstrations: Sequence[TokenExample] = (),
        run: RunFolder | None = None,
    ) -> None:
        self.config, self.model, self.run = config, model, run
        adapt(model, config)
        for index, comparison in enumerate((*train, *eval)):
            check_comparison(comparison, index)
        usable = usable_rankings("reward model", train, config.max_seq_tokens)
        self.comparisons, self.num_truncated = usable.comparisons, usable.num_truncated
        self.num_without_pair, self.num_too_long = usable.num_without_pair, usable.num_too_long
        self.eval = list(eval)
        if self.eval:
            fitting, _ = fit_comparisons(self.eval, config.max_seq_tokens)
            require_rows([c for c in fitting if has_pair(c)],
                         "held-out rankings with a pair of different ranks")
        self.demonstrations = [e.token_ids[-config.max_seq_tokens:] for e in demonstrations]
        self.steps_per_epoch = -(-len(self.comparisons) // config.batch_size)
        self.num_steps = config.max_steps or self.steps_per_epoch * config.num_epochs
        device = device_of(model, config)
        plan = plan_reward(config, shape_of_model("reward_model", model), device,
                           longest=max(group_lengths(self.comparisons)))
        self.memory = MemoryWatch(plan, model.head.weight.device, model.parameters(), run)
        self.config = fitted(config, plan, device.type)
        prepare_backbone(model, config)
        self.budget = TokenBudget(self.config)
        self.passes = PassBudget(self.config.max_tokens_per_microbatch)
        self.schedule = Schedule.from_config(config, self.num_steps)
        self.optimizer = AdamW.from_config(model.parameters(), config)
        self.num_finished = 0
        self.alarms = AlarmLog(self.config, Circumstances(num_steps=self.num_steps), run)

    @property
    def dropped_share(self) -> float:
        """Training rankings that were dropped, or lost the beginning of their prompt."""
        dropped = self.num_without_pair + self.num_too_long
        return (dropped + self.num_truncated) / (dropped + len(self.comparisons))

    def step(self) -> dict[str, float]:
        """One optimiser step over `batch_size` prompts; returns its metrics."""
        with self.memory.phase("update"):
            metrics = self._step()
        return metrics | self.memory.metrics()

    def _step(self) -> dict[str, float]:
        config, timer, number = self.config, PhaseTimer(), self.num_finished + 1
        epoch, index = divmod(self.num_finished, self.steps_per_epoch)
        rows = epoch_batches(len(self.comparisons), config.batch_size, config.seed, epoch)[index]
        batch = [self.comparisons[i] for i in rows]
        learning_rate, lengths = self.schedule(self.num_finished), group_lengths(batch)
        metrics = self.budget.step(number, partial(backward_ranking_loss, self.model, batch),
                                   self.optimizer, lengths, learning_rate,
                                   partial(self._find, batch))
        self.num_finished = number
        if number == 1:
            metrics["data/dropped_share"] = self.dropped_share
        return metrics | {
            "lr/model": learning_rate,
            "data/epoch": number / self.steps_per_epoch,
            "memory/peak_gib": peak_memory_gib(next(self.model.parameters()).device),
        } | timer.metrics(sum(lengths))

    def _find(self, batch: Sequence[Comparison]) -> str:
        """Where a NaN or an infinity of a minibatch comes from."""
        return trace(self.model, [c.prompt_ids for c in batch], lambda i: backward_ranking_loss(
            self.model, batch[i:i + 1], self.config))

    def train(self, progress: Progress | None = None) -> None:
        """Every step that is left, the shift, and the report on the held-out rankings."""
        progress = progress or SilentProgress()
        with Saver(self.config, self.run, self.state) as saver:
            while self.num_finished < self.num_steps:
                metrics = self.step()
                step, every = self.num_finished, self.config.eval_steps
                evaluate = bool(self.eval) and (step == self.num_steps
                                                or (every is not None and step % every == 0))
                if step == self.num_steps:
                    metrics["reward/bias"] = self.shift()
                if evaluate:
                    metrics |= self._eval_metrics()
                due = step % self.config.logging_steps == 0 or step == self.num_steps or evaluate
                metrics |= self.alarms.look(step, metrics)
                if self.run is not None and due:
                    self.run.log(step, metrics)
                self.alarms.stop_if_asked(step)
                progress.update(step, metrics)
                saver.after_step(step)

    def state(self) -> State:
        """All that the steps that are left depend on; tensors by reference."""
        return supervised_state(self, self.model, State())

    def load_state(self, state: State) -> None:
        """Go on where `state` was taken, by a trainer of the same model, settings and data.

        Raises:
            CheckpointError: when the state does not fit; nothing has changed then.
        """
        load_supervised_state("reward model", self, self.model, State(), state)

    def shift(self) -> float:
        """Set the head's bias so that demonstrations have mean reward 0; returns the bias.

        Without demonstrations, or with `shift_to_demonstrations` off, the completions of the
        training rankings get mean 0 instead.
        """
        if self.config.shift_to_demonstrations and self.demonstrations:
            kind, sequences, scores = ("demonstrations", self.demonstrations,
                                       self._scores(self.demonstrations))
        else:
            kind = "training completions"
            sequences, prompt_lens = prompted_sequences(self.comparisons)
            scores = self._scores(sequences, prompt_lens)
        bias = self.model.head.bias
        with torch.no_grad():
            bias -= scores.double().mean().to(bias)
        logger.info("reward model: bias %.6g gives %d %s a mean reward of 0", float(bias),
                    len(sequences), kind)
        if self.run is not None:
            self.run.update_run({"reward_shift": {"mean_zero_on": kind, "count": len(sequences),
                                                  "bias": float(bias)}})
        return float(bias)

    def evaluate(self, comparisons: Sequence[Comparison]) -> RewardReport:
        """Accuracy, calibration and the length-only baseline on held-out rankings.

        Writes `reward_report.json` into the run folder.

        Raises:
            DataError: when there is no pair of different ranks.
        """
        fitting, _ = fit_comparisons(comparisons, self.config.max_seq_tokens)
        scores = self._scores(*prompted_sequences(fitting)).tolist()
        groups, begin = [], 0
        for c in fitting:
            groups.append(scores[begin:begin + len(c.completions)])
            begin += len(c.completions)
        report = build_report(fitting, groups, self.comparisons)
        report = replace(report, num_too_long=len(comparisons) - len(fitting))
        if self.run is not None:
            self.run.write_json("reward_report.json", report.to_dict())
        return report

    def _eval_metrics(self) -> dict[str, float]:
        """The headline figures of a report."""
        timer = PhaseTimer()
        with timer.phase("eval"):
            report = self.evaluate(self.eval)
        return {
            "loss/ranking_eval": report.loss,
            "reward/accuracy_eval": report.overall.accuracy,
            "reward/length_accuracy_eval": report.overall.length_accuracy,
            "reward/calibration_error": report.calibration_error,
            "reward/score_mean": report.score_mean,
            "reward/score_std": report.score_std,
            "time/eval_s": timer.metrics()["time/eval_s"],
        }

    def _scores(
        self, sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int] | None = None
    ) -> Tensor:
        """[B] scores, no gradient."""
        return sequence_scores(self.model, sequences, self.passes, prompt_lens,
                               share_prefix=self.config.share_prefix)


def backward_ranking_loss(
    model: ScalarModel, comparisons: Sequence[Comparison], config: RewardConfig
) -> dict[str, float]:
    """Add the gradient of a minibatch's ranking loss; return its loss, accuracy and margin.

        loss = mean over prompts of the mean over pairs of -log sigmoid(r(better) - r(worse))
    """
    stats: list[RankingStats] = []

    def share(rows: list[int]) -> Tensor:
        group = [comparisons[i] for i in rows]
        values, batch = packed_forward(model, *prompted_sequences(group),
                                       share_prefix=config.share_prefix)
        device = values.device
        ranks = torch.tensor([r for c in group for r in c.ranks], device=device)
        sizes = torch.tensor([0, *[len(c.ranks) for c in group]], device=device)
        loss, partial = ranking_loss(
            values[batch.ends], ranks, sizes.cumsum(0), ties=config.ties,
            denominator=len(comparisons))
        stats.append(partial)
        return loss

    with mode(model, train=False):
        loss = accumulate(group_lengths(comparisons, config.share_prefix),
                          config.max_tokens_per_microbatch, share)
    total = reduce(operator.add, stats)
    return {
        "loss/ranking": float(loss),
        "reward/accuracy": float(total.correct_or_tied / total.count),
        "reward/margin_mean": float(total.margin / total.count),
    }
