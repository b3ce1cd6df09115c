"""When an allocation fails: how to know, and how to go on with smaller passes."""

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from fastrl.errors import DeviceMemoryError

logger = logging.getLogger("fastrl")

Result = TypeVar("Result")

CPU_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""How torch's allocator for CPUs says it, in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation of torch, on a GPU or a CPU, and for nothing else."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in CPU_SIGNS))


def call_again(
    call: Callable[[], Result], what: str, advice: str = "make batches or the model smaller",
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """What `call` returns; called once more, with all caches emptied, where memory ended.

    Args:
        call: Changes nothing before it has all memory that it needs.
        what: It does, with its sizes, for messages.
        advice: What to change, for the error.
        inside: Makes a context for each call.
    Raises:
        DeviceMemoryError: when memory ends twice.
    """
    for is_last in (False, True):
        try:
            with inside():
                return call()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if is_last:
                raise DeviceMemoryError(
                    f"{what}: expected memory for its temporaries, got none, twice in turn; free "
                    f"memory on the device, or {advice}") from error
        # Outside the handler: its traceback holds on to what the call has made.
        _empty_caches()
        logger.warning("%s: no memory; repeated, results are the same", what)
    raise AssertionError("not reached")


class PassBudget:
    """Tokens of one pass; where memory ends, half as many from then on.

    Args:
        max_tokens: What it begins with; a longer row gets a pass of its own.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    @staticmethod
    def of(max_tokens: "int | PassBudget") -> "PassBudget":
        """A caller's budget, which remembers what was too much, or a new one."""
        return max_tokens if isinstance(max_tokens, PassBudget) else PassBudget(max_tokens)

    def run(
        self, attempt: Callable[[int], Result], lengths: Sequence[int], what: str,
        undo: Callable[[], None] | None = None,
    ) -> Result:
        """What `attempt` returns; where memory ends it begins anew with half of the tokens.

        Args:
            attempt: Given the tokens of a pass, on which its result does not depend beyond
                rounding. It changes nothing that `undo` does not take back.
            lengths: Tokens of each row, in passes of its own or with others.
            what: It does, for messages.
            undo: Called before every attempt but the first, and before an error.
        Raises:
            DeviceMemoryError: when there is no memory for a row alone, twice in turn.
        """
        num_failures_alone = 0
        while True:
            try:
                return attempt(self.max_tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                is_alone = len(lengths) <= 1 or self.max_tokens < min(lengths)
                num_failures_alone += is_alone
                if num_failures_alone > 1:
                    if undo is not None:
                        undo()
                    raise DeviceMemoryError(
                        f"{what}: expected memory for at least one sequence at a time, got none "
                        f"for {len(lengths)} of up to {max(lengths, default=0)} tokens; lower the "
                        "length limits (max_seq_tokens, max_prompt_tokens, max_new_tokens), set "
                        "activation_checkpointing, or use a smaller model") from error
            # Outside the handler: its traceback holds on to what the attempt has made.
            if undo is not None:
                undo()
            _empty_caches()
            if not is_alone:
                self.max_tokens = max(1, min(self.max_tokens, sum(lengths)) // 2)
                logger.warning("%s: no memory for a pass; repeated with passes of %d tokens, which "
                               "stays; results are the same", what, self.max_tokens)


def _empty_caches() -> None:
    """Memory that nothing uses goes back to the device."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()
