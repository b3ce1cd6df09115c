"""Which running sequences have the pages of their prompt read once for all of them.

Host side only. What is decided here is speed: no token depends on it.
"""

from collections.abc import Sequence
from itertools import groupby

from fastrl.engine.request import Request

MAX_ROWS = 16
"""Sequences of a group: with four query heads per KV head they fill a tile of the kernel, and more
groups fill more of a GPU."""
MIN_TOKENS = 64
"""Shared tokens of a group: the kernel shares whole blocks of keys, and fewer save less than what
is handed from one launch to the next."""
MIN_SAVED_BYTES = 2**22
"""What all groups together have to save per layer and step: about as much as a GPU reads in the
time of one more launch, 1.3 us at 3 to 4 TB/s."""
Group = tuple[int, int, int]
"""(first row, rows, tokens that they share)."""


def prefix_groups(
    running: Sequence[Request], page_size: int, token_bytes: int, *, must_pay: bool = True
) -> list[Group]:
    """Groups of rows that hold the same pages, or none where they would not pay.

    Samples of a prompt are beside each other, since nothing overtakes. They share its full pages,
    unless the prompt was dropped and computed again between them.

    Args:
        running: Requests in the order of the decode batch.
        token_bytes: Of the keys and values of a token in one layer.
        must_pay: False shares however little that saves.
    """
    groups: list[Group] = []
    row = 0
    for (prompt, _), members in groupby(running, lambda r: (r.prompt, r.pages[0])):
        end = row + len(list(members))
        tokens = len(prompt.token_ids) // page_size * page_size
        if tokens >= MIN_TOKENS:
            groups += [(first, min(MAX_ROWS, end - first), tokens)
                       for first in range(row, end - 1, MAX_ROWS)]
        row = end
    saved = sum((count - 1) * tokens for _, count, tokens in groups) * token_bytes
    return groups if saved >= MIN_SAVED_BYTES or not must_pay else []
