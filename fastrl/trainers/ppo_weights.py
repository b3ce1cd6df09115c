"""Which weights of the policy are evaluated, kept and finally saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastrl.checkpoints import State
from fastrl.config import PPOConfig
from fastrl.memory.residents import SWAP, Residents
from fastrl.models.causal_lm import CausalLM
from fastrl.models.lora import trained_parameters
from fastrl.models.weights import save_causal_lm
from fastrl.optim import EMA
from fastrl.out_of_memory import call_again

LAST_MODEL, AVERAGE_MODEL = "last_model", "average_model"
"""Folders of a run for the weights that `model/` does not come from."""


@dataclass(frozen=True, slots=True)
class BestWeights:
    """The best policy so far."""

    iteration: int
    """Iterations finished when it was evaluated."""
    objective: float
    """Held-out score minus beta times KL."""
    weights: list[Tensor]
    """In the order of `trained_parameters(policy)`, on the CPU."""


class KeptWeights:
    """The moving average of a policy's weights, and the best weights seen in an evaluation.

    Args:
        policy: The model that is trained.
        config: `ema_decay`, `eval_with_ema` and `keep_best` decide what happens here.
    """

    def __init__(self, policy: CausalLM, config: PPOConfig) -> None:
        self.policy, self.config, self.trained = policy, config, trained_parameters(policy)
        self.ema = None if config.ema_decay is None else EMA(self.trained, config.ema_decay)
        self.best: BestWeights | None = None
        self._swapped: list[Tensor] = []

    def follow(self) -> None:
        """Move the average towards the present weights; once per optimiser step."""
        if self.ema is not None:
            self.ema.update()

    def averages(self) -> list[Tensor]:
        """The average's tensors, none where there is no average."""
        return [] if self.ema is None else self.ema.averages

    def swapped(self) -> list[Tensor]:
        """The policy's own weights while the average is evaluated in their place, else none."""
        return self._swapped

    @contextmanager
    def for_evaluation(self, residents: Residents) -> Iterator[None]:
        """Inside the block the policy has the weights that are judged: the average, or its own.

        The average and the policy's own weights are in memory while they are copied only, where
        they may be parked; the policy is there at the end.
        """
        if self.ema is None or not self.config.eval_with_ema:
            yield
            return
        with residents.phase("evaluation", *SWAP):
            self._swapped = call_again(self._copies, "copy of the policy for an evaluation",
                                       advice="set eval_with_ema to false")
            self.ema.copy_to()
        try:
            yield
        finally:
            with residents.phase("evaluation", "policy", "swapped"), torch.no_grad():
                for p, weight in zip(self.trained, self._swapped, strict=True):
                    p.copy_(weight)
            self._swapped = []

    def _copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trained]

    def offer(self, iteration: int, objective: float) -> None:
        """Keep a copy of the policy's present weights when they are the best so far."""
        if self.config.keep_best and (self.best is None or objective > self.best.objective):
            weights = [p.detach().to("cpu", copy=True) for p in self.trained]
            self.best = BestWeights(iteration, objective, weights)

    def best_state(self) -> State:
        """The best weights so far; `iteration` is None where there are none."""
        if self.best is None:
            return State(values={"iteration": None, "objective": None})
        return State({str(i): weight for i, weight in enumerate(self.best.weights)},
                     {"iteration": self.best.iteration, "objective": self.best.objective})

    def load_best_state(self, state: State) -> None:
        """Keep the best weights of a `best_state`.

        Raises:
            CheckpointError: when they are not those of such a policy.
        """
        has_best = state.values.get("iteration") is not None
        weights = [torch.empty_like(p, device="cpu") for p in self.trained] if has_best else []
        values = state.copy_to("best weights", {str(i): w for i, w in enumerate(weights)},
                               ("iteration", "objective"))
        self.best = BestWeights(values["iteration"], values["objective"],
                                weights) if has_best else None

    def save_other(self, folder: Path) -> None:
        """Save what is not judged: the last weights where the average is, else the average.

        Args:
            folder: Of the run; gets `last_model/` or `average_model/`, without tokenizer. Nothing
                is written where there is no average.
        """
        if self.ema is None:
            return
        if self.config.eval_with_ema:
            save_causal_lm(self.policy, folder / LAST_MODEL)
        else:
            with self.ema.swapped():
                save_causal_lm(self.policy, folder / AVERAGE_MODEL)

    @torch.no_grad()
    def load_chosen(self) -> str:
        """Put the weights to save into the policy for good; return which they are, in words."""
        if self.best is not None:
            for p, weight in zip(self.trained, self.best.weights, strict=True):
                p.copy_(weight)
            return (f"best held-out objective {self.best.objective:.4g}, after "
                    f"{self.best.iteration} iterations")
        if self.ema is not None and self.config.eval_with_ema:
            self.ema.copy_to()
            return f"moving average, decay {self.config.ema_decay}"
        return "last iteration"
