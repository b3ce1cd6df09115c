"""Answers of word problems."""

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from fastrl.errors import DataError
from fastrl.verify import gsm8k_reward
from fastrl.verify.answers import final_number


@pytest.mark.parametrize("text, number", [
    ("so 2 + 3 = 5\n#### 5", "5"),
    ("#### 3\nno, wait: #### 1,234.50 dollars, or 7", "1234.5"),
    ("She has 3 apples and 4 pears, 7 in all.", "7"),
    ("It costs $18.00.", "18"),
    ("minus 4 is -4", "-4"),
    ("half is .5", "0.5"),
    ("no number at all", None),
    ("", None),
    ("#### none, though 5 came before", "5"),
    ("5 apples ####", None),
    ("9" * 60, None),
])
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_scores_compare_numbers_not_texts() -> None:
    completions = ["#### 1000", "#### 1,000.0", "#### 100", "I do not know"]
    assert gsm8k_reward([""] * 4, completions, answer=["1,000", 1000, 1000.0, 3]) == [1, 1, 0, 0]


def test_demonstrations_hold_answers_too() -> None:
    rows = ["2 + 2 is 4\n#### 4", "3 + 3 is 6\n#### 6"]
    assert gsm8k_reward(["", ""], ["four is 4", "#### 7"], completion=rows) == [1, 0]


def test_rows_without_an_answer_are_an_error() -> None:
    with pytest.raises(DataError, match="rows with neither"):
        gsm8k_reward([""], ["1"])
    with pytest.raises(DataError, match="number as the answer of row 1, got 'none'"):
        gsm8k_reward(["", ""], ["1", "2"], answer=["1", "none"])


def test_every_demonstration_of_gsm8k_gets_full_marks(shared: Path) -> None:
    with gzip.open(shared / "data/sft/gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["completion"] for line in file]
    assert len(rows) == 7473
    assert set(gsm8k_reward([""] * len(rows), rows, completion=rows)) == {1.0}
    wrong = gsm8k_reward([""] * len(rows), [*rows[1:], rows[0]], completion=rows)
    assert sum(wrong) / len(rows) < 0.1
