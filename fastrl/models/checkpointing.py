"""Activation checkpointing: a layer keeps its inputs and runs again in the backward pass."""

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from torch.utils.checkpoint import checkpoint


def checkpointed(
    function: Callable[..., Any], *args: Any, keeps_random_state: bool = False, **kwargs: Any
) -> Any:
    """`function(*args, **kwargs)`, of which only the arguments are kept for the backward pass.

    The second run sees the context variables of the first (the backend that was asked for): on a
    GPU, autograd runs it in a thread of its own.

    Args:
        function: Must compute the same both times.
        keeps_random_state: The second run draws the random numbers of the first.
    Returns:
        What the function returns; gradients are those of the plain call, bit for bit where the
        function itself has the same bits twice.
    Source: Chen et al. 2016 (arXiv 1604.06174).
    """
    context = copy_context()

    def run(*args: Any, **kwargs: Any) -> Any:
        return context.copy().run(function, *args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=keeps_random_state,
                      **kwargs)
