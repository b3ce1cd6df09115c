"""Answers on screen while a stage trains: what a person watches, beside the numbers."""

from collections.abc import Mapping, Sequence

from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import TextEncoder
from fastrl.evaluation import generate_for
from fastrl.models import CausalLM
from fastrl.rewards import decode_response
from fastrl.trainers.common import Progress
from fastrl.types import Prompt

NUM_PROMPTS = 3
"""Prompts that fit on a screen, answered by several models."""

SAMPLING = SamplingConfig(max_new_tokens=32)
"""Short answers, for stages without sampling settings of their own."""


class AnsweringProgress:
    """Shows progress and, every `every` steps, what the model answers to the same prompts.

    Args:
        progress: Shows the numbers.
        model: The model in training.
        prompts: The first `NUM_PROMPTS` are answered; none: nothing is.
        every: Steps between answers; the first and the last step are answered too.
        num_steps: Steps of the stage.
    """

    def __init__(self, progress: Progress, console: Console, name: str, model: CausalLM,
                 encoder: TextEncoder, prompts: Sequence[Prompt], every: int, num_steps: int,
                 sampling: SamplingConfig = SAMPLING) -> None:
        self._progress, self._console, self._name = progress, console, name
        self._model, self._encoder, self._sampling = model, encoder, sampling
        self._prompts, self._every, self._num_steps = prompts[:NUM_PROMPTS], every, num_steps

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass the numbers on; answer when it is time."""
        self._progress.update(step, metrics)
        if self._prompts and (step % self._every == 0 or step in (1, self._num_steps)):
            rollout = generate_for(self._model, [p.token_ids for p in self._prompts],
                                   self._sampling, seed=step)
            answers = [decode_response(rollout, i, self._encoder)
                       for i in range(len(self._prompts))]
            self._console.answers(self._name, step, [p.text for p in self._prompts], answers)
