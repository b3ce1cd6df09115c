"""When an allocation fails: how to know, and how to go on with smaller passes."""

import logging
from collections.abc import Callable, Sequence

import torch

from fastrl.errors import DeviceMemoryError
from fastrl.packing import split_by_tokens

logger = logging.getLogger("fastrl")

CPU_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""How torch's allocator for CPUs says it, in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for a failed allocation of torch, on a GPU or a CPU, and for nothing else."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in CPU_SIGNS))


def run_in_passes(
    lengths: Sequence[int], max_tokens: int, run: Callable[[list[int]], None], what: str
) -> None:
    """`run` every row, as many at a time as `max_tokens` allow and as there is memory for.

    Where memory ends, the pass that failed is repeated with half of its tokens, and so are those
    after it.

    Args:
        lengths: Tokens of each row.
        max_tokens: Tokens of a pass; a longer row gets one of its own.
        run: Given consecutive row numbers; changes nothing when it fails.
        what: Of what the rows are, for messages.
    Raises:
        DeviceMemoryError: when there is no memory for a single row, twice in turn.
    """
    begin, num_failures = 0, 0
    while begin < len(lengths):
        rows = [begin + i for i in split_by_tokens(lengths[begin:], max_tokens)[0]]
        try:
            run(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            num_failures += 1
            if len(rows) == 1 and num_failures > 1:
                raise too_long(what, lengths[begin]) from error
        else:
            begin, num_failures = rows[-1] + 1, 0
            continue
        if len(rows) > 1:  # outside the handler: its traceback holds on to what the pass has made
            max_tokens = sum(lengths[i] for i in rows) // 2
            logger.warning("%s: no memory for a pass of %d tokens; going on with passes of %d, "
                           "results are the same", what, 2 * max_tokens, max_tokens)


def too_long(what: str, num_tokens: int) -> DeviceMemoryError:
    """The error for a row that does not fit even alone."""
    return DeviceMemoryError(
        f"{what}: expected memory for at least one sequence at a time, got none for one of "
        f"{num_tokens} tokens; lower the length limits (max_seq_tokens, max_prompt_tokens, "
        f"max_new_tokens), set activation_checkpointing, or use a smaller model")
