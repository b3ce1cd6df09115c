"""The token budget of a run's microbatches, halved where memory ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from torch import Tensor

from fastrl.config import TrainConfig
from fastrl.optim import AdamW, clip_scale
from fastrl.out_of_memory import PassBudget
from fastrl.trainers.nonfinite import StepGuard, first_nonfinite

Config = TypeVar("Config", bound=TrainConfig)
Result = TypeVar("Result")


class TokenBudget(Generic[Config]):
    """Runs minibatches; after one that found no memory, microbatches stay half as large.

    Args:
        config: `max_tokens_per_microbatch` is what the run begins with.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        """The run's settings with the budget as it is now."""
        self.guard = StepGuard(config)
        self._passes = PassBudget(config.max_tokens_per_microbatch)

    @property
    def max_tokens(self) -> int:
        """Tokens of a microbatch now."""
        return self._passes.max_tokens

    @max_tokens.setter
    def max_tokens(self, max_tokens: int) -> None:
        self._passes.max_tokens = max_tokens
        self.config = replace(self.config, max_tokens_per_microbatch=max_tokens)

    def run(
        self, attempt: Callable[[Config], Result], optimizer: AdamW, lengths: Sequence[int]
    ) -> Result:
        """What `attempt` returns, which adds up the gradients of one whole minibatch.

        Where memory ends, all gradients are dropped and the minibatch is repeated with half the
        budget. The loss of a minibatch does not depend on the budget.

        Args:
            attempt: Given the settings; keeps nothing from one attempt to the next.
            optimizer: Of the gradients.
            lengths: Tokens of the rows of the minibatch.
        Raises:
            DeviceMemoryError: when there is no memory for a row alone, twice in turn.
        """
        def attempt_with(max_tokens: int) -> Result:
            self.config = replace(self.config, max_tokens_per_microbatch=max_tokens)
            return attempt(self.config)

        optimizer.zero_grad()
        return self._passes.run(attempt_with, lengths, "update", optimizer.zero_grad)

    def step(
        self, number: int, backward: Callable[[Config], dict[str, float]], optimizer: AdamW,
        lengths: Sequence[int], learning_rate: float, find: Callable[[], str],
    ) -> dict[str, float]:
        """One optimiser step on a whole minibatch: gradients, clip norm, check, new weights.

        Args:
            number: Of the step, for errors.
            backward: As `attempt` of `run`; returns the metrics of the minibatch.
            optimizer, lengths: As `run` takes them.
            find: Says where a NaN or an infinity comes from.
        Returns:
            Those metrics, the gradient's norm and the budget; of a skipped step those that are
            finite.
        Raises:
            NumericsError: at a metric that is not finite, before it reaches the weights, where the
                step is not to be skipped.
        """
        def attempt(config: Config) -> tuple[dict[str, float], Tensor | None]:
            metrics = backward(config)
            metrics["grad/norm"], scale = clip_scale(optimizer.parameters, config.max_grad_norm)
            return metrics, scale

        metrics, scale = self.run(attempt, optimizer, lengths)
        bad = first_nonfinite(metrics)
        if bad is None:
            optimizer.step(learning_rate, scale)
            self.guard.passed()
        else:
            where = find()
            optimizer.zero_grad()
            self.guard.refuse(f"step {number}: expected finite metrics, got {bad}; {where}")
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self.guard.num_skipped:
            metrics["update/num_skipped"] = float(self.guard.num_skipped)
        return metrics | self.metrics()

    def metrics(self) -> dict[str, float]:
        """The budget, under the name that it is logged as."""
        return {"memory/max_tokens_per_microbatch": float(self.config.max_tokens_per_microbatch)}
