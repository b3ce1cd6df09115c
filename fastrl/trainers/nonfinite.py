"""What a NaN or an infinity does to a run, and where it came from.

Nothing here costs a healthy step anything: the numbers that are looked at are on the host already,
and modules are watched only in a second pass over the rows of a step that failed.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastrl.checkpoints import State
from fastrl.config import TrainConfig
from fastrl.errors import NumericsError

logger = logging.getLogger("fastrl")


class StepGuard:
    """Ends the run at a NaN or an infinity, or counts a skipped step, as `on_nonfinite` says."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.num_skipped = 0
        """Steps skipped so far."""
        self.num_in_a_row = 0
        """Steps skipped since the last that was taken."""

    def refuse(self, reason: str) -> None:
        """Skip a step.

        Args:
            reason: What was expected, what came, and where.
        Raises:
            NumericsError: with `on_nonfinite: stop`, and at the step after `max_skipped_steps` in
                a row.
        """
        if self.config.on_nonfinite == "stop":
            raise NumericsError(f"{reason}; weights are those of the step before. Lower the "
                                "learning rate, set max_grad_norm, check the data and the scores, "
                                "or set on_nonfinite to skip")
        if self.num_in_a_row >= self.config.max_skipped_steps:
            raise NumericsError(f"{reason}; {self.num_in_a_row} steps before it were skipped in a "
                                "row, max_skipped_steps: the run ends")
        self.num_skipped += 1
        self.num_in_a_row += 1
        logger.warning("%s; this step is skipped, weights and optimiser stay as they are", reason)

    def passed(self) -> None:
        """A step was taken."""
        self.num_in_a_row = 0

    def state(self) -> State:
        """Both counts."""
        return State(values={"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row})

    def load_state(self, state: State) -> None:
        """Go on where `state` was taken."""
        values = state.copy_to("steps skipped", {}, ("num_skipped", "num_in_a_row"))
        self.num_skipped, self.num_in_a_row = values["num_skipped"], values["num_in_a_row"]


def first_nonfinite(metrics: Mapping[str, float]) -> str | None:
    """The first metric that is no finite number, with its value; None when all are."""
    return next((f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)),
                None)


def trace(
    model: nn.Module, sequences: Sequence[Sequence[int]], pass_of: Callable[[int], object],
    decode: Callable[[list[int]], str] | None = None,
) -> str:
    """Which row it is alone, and in which module it is seen first, in words.

    Args:
        model: Its modules are watched. Gradients are left behind: the caller drops them.
        sequences: Token ids of each row, for the words.
        pass_of: Forward, and backward where there was one, of one row; may return its metrics.
        decode: Makes text of tokens.
    """
    for row, token_ids in enumerate(sequences):
        model.zero_grad(set_to_none=True)
        with _watched(model) as found, suppress(NumericsError):
            metrics = pass_of(row)
            if isinstance(metrics, Mapping) and (bad := first_nonfinite(metrics)):
                found.append(bad)
        found += [f"the gradient of {name}" for name, p in model.named_parameters()
                  if p.grad is not None and not bool(p.grad.isfinite().all())]
        if found:
            text = list(token_ids[:16]) if decode is None else \
                f"{decode(list(token_ids))[:200]!r}"
            return f"row {row} alone has it, first in {found[0]}; it begins with {text}"
    return "no row alone has it, so that it comes from their sum, or from this pass alone"


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Inside the block outputs of modules, and their gradients, that are not finite are noted."""
    found: list[str] = []

    def look(what: str, tensor: Tensor | None) -> None:
        if not found and tensor is not None and not bool(tensor.isfinite().all()):
            found.append(what)

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                look(f"the output of {name}", tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(  # type: ignore[no-untyped-call]
                        partial(look, f"the gradient at the output of {name}"))

    handles = [module.register_forward_hook(partial(after, name or type(model).__name__))
               for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
