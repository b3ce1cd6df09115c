"""Answers of word problems, compared as numbers."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from fastrl.errors import DataError

MARK = "####"
"""Comes before the answer in GSM8K."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MAX_DIGITS = 50


def gsm8k_reward(
    prompts: Sequence[str], completions: Sequence[str], *,
    answer: Sequence[object] | None = None, completion: Sequence[object] | None = None,
) -> list[float]:
    """1 for every completion that ends in the right number, else 0.

    The number is the one after the last `####`; without such a mark the last number of the text.
    1,000 equals 1000 and $5.00 equals 5.

    Args:
        prompts: Not read.
        completions: B texts.
        answer: The right answers as numbers, or as texts that hold them.
        completion: Demonstrations whose last line holds the answer, where `answer` is None; so
            that the rows of GSM8K's SFT file serve as prompts.
    Returns:
        B scores.
    Raises:
        DataError: when a row has no answer that is a number.
    Source: Cobbe et al. 2021 (arXiv 2110.14168) for the data and the mark.
    """
    gold = answer if answer is not None else completion
    if gold is None:
        raise DataError("gsm8k_reward: expected prompts whose rows have an answer, or a completion "
                        "that ends in '#### answer', got rows with neither; add the column")
    scores = []
    for index, (text, right) in enumerate(zip(completions, gold, strict=True)):
        target = final_number(str(right))
        if target is None:
            raise DataError(f"gsm8k_reward: expected a number as the answer of row {index}, got "
                            f"{str(right)[-80:]!r}; correct the row")
        scores.append(1.0 if final_number(text) == target else 0.0)
    return scores


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or the last number of a text without the mark.

    None where there is none, or where it has more than 50 digits.
    """
    _, mark, tail = text.rpartition(MARK)
    found = _NUMBER.findall(tail)
    if not found:
        return None
    word = (found[0] if mark else found[-1]).replace(",", "")
    try:
        return Decimal(word) if len(word) <= _MAX_DIGITS else None
    except InvalidOperation:
        return None
