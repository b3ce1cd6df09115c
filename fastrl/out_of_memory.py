"""When an allocation fails: how to know, and how to go on with smaller passes."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastrl.errors import DeviceMemoryError
from fastrl.packing import split_by_tokens

logger = logging.getLogger("fastrl")

Result = TypeVar("Result")

CPU_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""How torch's allocator for CPUs says it, in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation of torch, on a GPU or a CPU, and for nothing else."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in CPU_SIGNS))


def call_again(call: Callable[[], Result], what: str) -> Result:
    """What `call` returns; called once more, with all caches emptied, where memory ended.

    Args:
        call: Changes nothing before it has all memory that it needs.
        what: It does, for messages.
    Raises:
        DeviceMemoryError: when memory ends twice.
    """
    for is_last in (False, True):
        try:
            return call()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if is_last:
                raise DeviceMemoryError(
                    f"{what}: expected memory for its temporaries, got none, twice in turn; free "
                    "memory on the device, or make batches or the model smaller") from error
        # Outside the handler: its traceback holds on to what the call has made.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            gc.collect()
            torch.cuda.empty_cache()
        logger.warning("%s: no memory; repeated, results are the same", what)
    raise AssertionError("not reached")


def run_in_passes(
    lengths: Sequence[int], max_tokens: int, run: Callable[[list[int]], None], what: str,
    prompts: Sequence[Sequence[int]] | None = None,
) -> None:
    """`run` every row, as many at a time as `max_tokens` allow and as there is memory for.

    Where memory ends, the pass that failed is repeated with half of its tokens, and so are those
    after it.

    Args:
        lengths: Tokens of each row.
        max_tokens: Tokens of a pass; a longer row gets one of its own.
        run: Given row numbers; changes nothing that a repetition does not make good.
        what: Of what the rows are, for messages.
        prompts: See `split_by_tokens`.
    Raises:
        DeviceMemoryError: when there is no memory for a single row, twice in turn.
    """
    left, num_failures = list(range(len(lengths))), 0
    while left:
        done: set[int] = set()
        rows: list[int] = []
        try:
            for group in split_by_tokens([lengths[i] for i in left], max_tokens,
                                         None if prompts is None else [prompts[i] for i in left]):
                rows = [left[place] for place in group]
                run(rows)
                done.update(rows)
                num_failures = 0
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            num_failures += 1
            if len(rows) == 1 and num_failures > 1:
                raise too_long(what, lengths[rows[0]]) from error
        # Outside the handler: its traceback holds on to what the pass has made.
        left = [i for i in left if i not in done]
        if len(rows) > 1:
            max_tokens = max(1, min(max_tokens, sum(lengths[i] for i in rows)) // 2)
            logger.warning("%s: no memory for a pass; going on with passes of %d tokens, results "
                           "are the same", what, max_tokens)


def too_long(what: str, num_tokens: int) -> DeviceMemoryError:
    """The error for a row that does not fit even alone."""
    return DeviceMemoryError(
        f"{what}: expected memory for at least one sequence at a time, got none for one of "
        f"{num_tokens} tokens; lower the length limits (max_seq_tokens, max_prompt_tokens, "
        f"max_new_tokens), set activation_checkpointing, or use a smaller model")
