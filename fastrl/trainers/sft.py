"""Supervised fine-tuning on demonstrations, and pretraining on windows of text.

The loss of a step is the token mean over its whole batch, so microbatches and packing never change
it. (With residual dropout the masks are drawn per microbatch: another token budget then draws
others.)
"""

import json
import logging
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.alarms import Circumstances
from fastrl.checkpoints import State
from fastrl.checkpoints.saver import Saver
from fastrl.config import SFTConfig
from fastrl.errors import ConfigError
from fastrl.memory.measure import MemoryWatch, device_of, fitted
from fastrl.memory.shapes import shape_of_model
from fastrl.memory.stages import plan_sft
from fastrl.metrics import PhaseTimer, RunFolder, peak_memory_gib, write_atomic
from fastrl.models.causal_lm import CausalLM
from fastrl.models.lora import adapt, trained_parameters
from fastrl.models.weights import load_causal_lm, save_causal_lm
from fastrl.optim import AdamW, Schedule
from fastrl.out_of_memory import PassBudget
from fastrl.trainers.alarm_log import AlarmLog
from fastrl.trainers.budget import TokenBudget
from fastrl.trainers.common import (
    Progress,
    SilentProgress,
    backward_token_loss,
    check_example,
    check_finite,
    derive_seed,
    epoch_batches,
    evaluate_token_loss,
    mode,
    num_targets,
    prepare_backbone,
    require_rows,
    seeded,
    stream_indices,
)
from fastrl.trainers.nonfinite import trace
from fastrl.trainers.supervised_state import load_supervised_state, supervised_state
from fastrl.types import TokenExample

logger = logging.getLogger("fastrl")

CandidateScore = Callable[[CausalLM], float]
"""How good a checkpoint is; higher is better. Mean reward-model score of its responses."""


class SFTTrainer:
    """Trains a causal language model on token examples.

    Args:
        config: Every setting.
        model: Trained in place; after `train` it holds the selected weights.
        train: Demonstrations, or windows of text. Examples longer than `max_seq_tokens` or without
            a target are dropped and counted in `num_dropped`.
        eval: Held-out examples.
        ptx: Pretraining windows, mixed into every step when `ptx_ratio` is above 0.
        run: Where metrics and candidates go; None writes nothing.
        score: Judges checkpoints when `select_by` is "reward". Without it the candidates are kept
            in `<run>/candidates/step-N` for `select_candidate`, and the last weights stay.
    Raises:
        ConfigError: when the settings ask for data or a judge that is not given.
        DataError: when no example is left, or an example is malformed.
    Source: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5 and appendix C.1.
    """

    def __init__(
        self,
        config: SFTConfig,
        model: CausalLM,
        train: Sequence[TokenExample],
        *,
        eval: Sequence[TokenExample] = (),
        ptx: Sequence[TokenExample] = (),
        run: RunFolder | None = None,
        score: CandidateScore | None = None,
    ) -> None:
        self.config, self.model, self.run, self.score = config, model, run, score
        adapt(model, config)
        self.examples = usable_examples(train, config)
        require_rows(self.examples, "SFT data")
        self.eval, self.ptx = usable_examples(eval, config), list(ptx)
        for index, window in enumerate(self.ptx):
            check_example(window, index)
        self._check()
        self.num_dropped = len(train) - len(self.examples)
        if self.num_dropped:
            logger.warning("SFT: dropped %d of %d examples: longer than max_seq_tokens=%d, or "
                           "without a target token", self.num_dropped, len(train),
                           config.max_seq_tokens)
        lengths = [len(e.token_ids) for e in self.examples]
        self.rows = (pack_rows(lengths, config.max_seq_tokens) if config.packing
                     else [[i] for i in range(len(lengths))])
        self.steps_per_epoch = -(-len(self.rows) // config.batch_size)
        self.num_steps = config.max_steps or self.steps_per_epoch * config.num_epochs
        self.eval_points = _eval_points(self.num_steps, config.eval_steps or self.steps_per_epoch)
        self.candidate_points = _spread(self.eval_points, config.num_candidates)
        longest = max(len(e.token_ids) for e in (*self.examples, *self.eval, *self.ptx))
        device = device_of(model, config)
        plan = plan_sft(config, shape_of_model("policy", model), device, longest=longest)
        self.memory = MemoryWatch(plan, model.lm_head.weight.device, model.parameters(), run)
        self.config = fitted(config, plan, device.type)
        prepare_backbone(model, config)
        self.budget = TokenBudget(self.config)
        self.passes = PassBudget(self.config.max_tokens_per_microbatch)
        self.schedule = Schedule.from_config(config, self.num_steps)
        self.optimizer = AdamW.from_config(model.parameters(), config)
        self.num_finished = self._num_examples = self._num_windows = 0
        self.selected_step: int | None = None
        self.alarms = AlarmLog(self.config, Circumstances(num_steps=self.num_steps), run)
        self._best: tuple[float, list[Tensor]] | None = None

    def step(self) -> dict[str, float]:
        """One optimiser step; returns its metrics."""
        with self.memory.phase("update"):
            metrics = self._step()
        return metrics | self.memory.metrics()

    def _step(self) -> dict[str, float]:
        timer, number = PhaseTimer(), self.num_finished + 1
        examples, windows = self._next_batch()
        learning_rate = self.schedule(self.num_finished)
        lengths = [len(e.token_ids) for e in (*examples, *windows)]
        metrics = self.budget.step(number, partial(self._backward, number, examples, windows),
                                   self.optimizer, lengths, learning_rate,
                                   partial(self._find, number, (*examples, *windows)))
        self.num_finished = number
        if number == 1:
            num_rows = self.num_dropped + len(self.examples)
            metrics["data/dropped_share"] = self.num_dropped / num_rows
        return metrics | {
            "lr/model": learning_rate,
            "data/epoch": number / self.steps_per_epoch,
            "data/target_tokens": float(num_targets(examples)),
            "memory/peak_gib": peak_memory_gib(next(self.model.parameters()).device),
        } | timer.metrics(sum(lengths))

    def _backward(
        self, number: int, examples: Sequence[TokenExample], windows: Sequence[TokenExample],
        config: SFTConfig,
    ) -> dict[str, float]:
        """Add up the gradients of step `number`; return its metrics."""
        with self._training(number):
            loss = backward_token_loss(self.model, examples, config.max_tokens_per_microbatch)
            metrics = {"loss/train": loss}
            if windows:
                metrics["loss/ptx"] = backward_token_loss(
                    self.model, windows, config.max_tokens_per_microbatch, config.ptx_coef)
        return metrics

    def _find(self, number: int, examples: Sequence[TokenExample]) -> str:
        """Where a NaN or an infinity in step `number` comes from."""
        return trace(self.model, [e.token_ids for e in examples],
                     lambda i: self._backward(number, examples[i:i + 1], (), self.config))

    def train(self, progress: Progress | None = None) -> None:
        """Every step that is left, with evaluations; then the selected weights."""
        progress = progress or SilentProgress()
        if self.run is not None and self.eval and self.num_finished == 0:
            self.run.log(0, {"loss/eval": self._eval_loss()})
        with Saver(self.config, self.run, self.state) as saver:
            while self.num_finished < self.num_steps:
                metrics = self.step()
                step = self.num_finished
                if step in self.eval_points:
                    metrics |= self._evaluate(step)
                due = step % self.config.logging_steps == 0 or step in self.eval_points
                metrics |= self.alarms.look(step, metrics)
                if self.run is not None and due:
                    self.run.log(step, metrics)
                self.alarms.stop_if_asked(step)
                progress.update(step, metrics)
                saver.after_step(step)
        if self._best is not None:
            with torch.no_grad():
                for parameter, weight in zip(trained_parameters(self.model), self._best[1],
                                             strict=True):
                    parameter.copy_(weight)
        elif self.config.select_by == "last":
            self.selected_step = self.num_steps

    def state(self) -> State:
        """All that the steps that are left depend on; tensors by reference."""
        return supervised_state(self, self.model, self._own_state(self._best))

    def load_state(self, state: State) -> None:
        """Go on where `state` was taken, by a trainer of the same model, settings and data.

        Raises:
            CheckpointError: when the state does not fit; nothing has changed then.
        """
        best = None
        if state.values.get("best_value") is not None:
            best = (state.values["best_value"],
                    [torch.empty_like(p, device="cpu") for p in trained_parameters(self.model)])
        values = load_supervised_state("SFT", self, self.model, self._own_state(best), state)
        self._best, self.selected_step = best, values["selected_step"]
        self._num_examples, self._num_windows = values["num_examples"], values["num_windows"]

    def _own_state(self, best: tuple[float, list[Tensor]] | None) -> State:
        """The part that other trainers do not have; `best` are the best weights so far."""
        weights = [] if best is None else best[1]
        return State({f"best_weight.{i}": weight.detach() for i, weight in enumerate(weights)},
                     {"best_value": None if best is None else best[0],
                      "selected_step": self.selected_step,
                      "num_examples": self._num_examples, "num_windows": self._num_windows})

    def _next_batch(self) -> tuple[list[TokenExample], list[TokenExample]]:
        """The examples and the pretraining windows of the next step."""
        config = self.config
        epoch, index = divmod(self.num_finished, self.steps_per_epoch)
        batches = epoch_batches(len(self.rows), config.batch_size, config.seed, epoch)
        examples = [self.examples[i] for row in batches[index] for i in self.rows[row]]
        self._num_examples += len(examples)
        # The share is exact over the run, also where a single step asks for part of a window.
        due = int(self._num_examples * config.ptx_ratio)
        picks = stream_indices(len(self.ptx), derive_seed(config.seed, "ptx"), self._num_windows,
                               due - self._num_windows)
        self._num_windows = due
        return examples, [self.ptx[i] for i in picks]

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out loss and, where this checkpoint is a candidate, its value."""
        timer, metrics = PhaseTimer(), {}
        with timer.phase("eval"):
            if self.eval:
                metrics["loss/eval"] = self._eval_loss()
            if self.config.select_by == "loss":
                self._keep_if_best(step, -metrics["loss/eval"])
            if self.config.select_by == "reward" and step in self.candidate_points:
                metrics |= self._judge(step)
        return metrics | {"time/eval_s": timer.metrics()["time/eval_s"]}

    def _eval_loss(self) -> float:
        return evaluate_token_loss(self.model, self.eval, self.passes)

    def _judge(self, step: int) -> dict[str, float]:
        """Score a candidate, or keep it in the run folder until there is a judge."""
        if self.score is None:
            assert self.run is not None  # checked on creation
            save_causal_lm(self.model, self.run.path / "candidates" / f"step-{step}")
            return {}
        with mode(self.model, train=False):
            value = float(self.score(self.model))
        check_finite(step, {"select/score": value})
        self._keep_if_best(step, value)
        return {"select/score": value}

    def _keep_if_best(self, step: int, value: float) -> None:
        """Remember these weights when no earlier checkpoint was as good."""
        if self._best is None or value > self._best[0]:
            weights = [p.detach().to("cpu", copy=True) for p in trained_parameters(self.model)]
            self._best, self.selected_step = (value, weights), step

    @contextmanager
    def _training(self, number: int) -> Iterator[None]:
        """Dropout on for one step, drawn from a generator of its own; everything off afterwards."""
        rate = self.config.residual_dropout
        backbone: Any = self.model.backbone
        device = next(self.model.parameters()).device
        # Train mode only for residual dropout: other rates a checkpoint may carry stay off.
        with (mode(self.model, train=rate > 0),
              seeded(derive_seed(self.config.seed, "dropout", number), device)):
            if rate > 0:
                backbone.residual_dropout = rate
            try:
                yield
            finally:
                if rate > 0:
                    backbone.residual_dropout = 0.0

    def _check(self) -> None:
        """Raise ConfigError when the settings ask for something that is not there."""
        config = self.config
        if config.select_by == "loss" and not self.eval:
            raise ConfigError("select_by: expected held-out examples for 'loss', got none; give "
                              "eval examples or set select_by to 'last'")
        if config.select_by == "reward" and self.score is None and self.run is None:
            raise ConfigError("select_by: expected a score or a run folder that keeps candidates "
                              "for 'reward', got neither; give one or set select_by to 'last'")
        if config.ptx_ratio > 0 and not self.ptx:
            raise ConfigError(f"ptx_ratio: expected pretraining windows for {config.ptx_ratio}, "
                              "got none; give ptx windows or set ptx_ratio to 0")
        if config.residual_dropout > 0 and not hasattr(self.model.backbone, "residual_dropout"):
            raise ConfigError(
                f"residual_dropout: expected 0 for {self.model.spec.architecture}, which runs "
                f"through transformers without it, got {config.residual_dropout}; set it to 0"
            )


def usable_examples(examples: Sequence[TokenExample], config: SFTConfig) -> list[TokenExample]:
    """The examples that fit `max_seq_tokens` and have a target, masked as `loss_on` says.

    Raises:
        DataError: when a mask does not fit its tokens, or marks the first one.
    """
    kept = []
    for index, example in enumerate(examples):
        check_example(example, index)
        if config.loss_on == "all":
            everything = (False, *[True] * (len(example.token_ids) - 1))
            example = replace(example, loss_mask=everything)
        if any(example.loss_mask) and len(example.token_ids) <= config.max_seq_tokens:
            kept.append(example)
    return kept


def pack_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill rows of at most `max_tokens` with whole examples, best fit, longest first.

    Args:
        lengths: Tokens of each example, none above `max_tokens`.
    Returns:
        Lists of example numbers; every example is in one row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = max_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return rows


def select_candidate(
    run_path: str | Path,
    score: CandidateScore,
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> Path:
    """The best of the candidates that an SFT run kept, judged now.

    Every candidate is loaded in turn; the scores go to `<run>/candidates/scores.json`. Of equal
    candidates the earliest wins.

    Args:
        run_path: Folder of a finished SFT run with `select_by` "reward".
        score: Judges a model; higher is better.
        dtype: Type of the weights while judged.
        device: Where the candidates are judged.
    Returns:
        The folder of the winner, a checkpoint without tokenizer.
    Raises:
        ConfigError: when the run kept no candidates.
        NumericsError: when a score is not finite.
    """
    folder = Path(run_path) / "candidates"
    steps = sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))
    if not steps:
        raise ConfigError(f"select_candidate: expected folders step-N in {folder}, found none; run "
                          "SFT with select_by 'reward' and no score")
    scores = {}
    for step in steps:
        model = load_causal_lm(folder / f"step-{step}", dtype=dtype, device=device)
        with mode(model, train=False):
            scores[step] = float(score(model))
        check_finite(step, {"select/score": scores[step]})
    best = max(steps, key=lambda step: scores[step])
    text = json.dumps({"selected": f"step-{best}",
                       "scores": {f"step-{s}": value for s, value in scores.items()}}, indent=2)
    write_atomic(folder / "scores.json", text + "\n")
    return folder / f"step-{best}"


def _eval_points(num_steps: int, every: int) -> list[int]:
    """Steps after which to evaluate; the last step is always one."""
    return sorted({*range(every, num_steps + 1, every), num_steps})


def _spread(points: Sequence[int], count: int) -> list[int]:
    """At most `count` of the points, evenly spaced, the last one included."""
    count = min(count, len(points))
    return [points[(i + 1) * len(points) // count - 1] for i in range(count)]
