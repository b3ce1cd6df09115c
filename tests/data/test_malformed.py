"""The broken files of ../shared/data/malformed, and the same cases line by line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastrl.data import TextEncoder, load_comparisons, load_demonstrations, load_prompts
from fastrl.errors import DataError

GOOD = {"prompt": "What is the capital of France?", "completion": "Paris."}
BROKEN_FILES = [
    ("bad_json.jsonl", ", line 3, column 58: expected valid JSON"),
    ("missing_field.jsonl", ", line 2, field 'completion': expected a text, got nothing"),
    ("empty_completion.jsonl", ", line 2, field 'completion': expected a text that is not blank"),
    ("wrong_types.jsonl", ", line 2, field 'prompt': expected a text, got the number 17"),
    ("invalid_utf8.jsonl", ", line 2, byte 26: expected UTF-8, got the byte 0xE9"),
    ("empty.jsonl", ": expected at least one row, got none"),
]
BROKEN_LINES = [
    ("missing_field.jsonl", 4, "field 'prompt': expected a text, got nothing"),
    ("empty_completion.jsonl", 3,
     "field 'completion': expected a text that is not blank, got only white space"),
    ("wrong_types.jsonl", 3, "field 'completion': expected a text, got a list of length 2"),
    ("wrong_types.jsonl", 4, "field 'completion': expected a text, got null"),
    ("wrong_types.jsonl", 5, "the row: expected a JSON object, got a list of length 2"),
    ("wrong_types.jsonl", 6, "the row: expected a JSON object, got a text of length 13"),
    ("wrong_types.jsonl", 7, "field 'prompt': expected a text, got an object"),
]


@pytest.mark.parametrize(("name", "expected"), BROKEN_FILES)
def test_broken_file(required_shared: Path, own: TextEncoder, name: str, expected: str) -> None:
    path = required_shared / "data" / "malformed" / name
    with pytest.raises(DataError) as caught:
        load_demonstrations(path, own, 512)
    assert str(caught.value).startswith(f"{path}{expected}")


@pytest.mark.parametrize(("name", "line", "expected"), BROKEN_LINES)
def test_broken_line(required_shared: Path, own: TextEncoder, tmp_path: Path, name: str,
                     line: int, expected: str) -> None:
    lines = (required_shared / "data" / "malformed" / name).read_bytes().split(b"\n")
    good = json.dumps(GOOD).encode()
    path = tmp_path / "one.jsonl"
    path.write_bytes(b"\n".join([good] * (line - 1) + [lines[line - 1]]))
    with pytest.raises(DataError) as caught:
        load_demonstrations(path, own, 512)
    assert str(caught.value).startswith(f"{path}, line {line}, {expected}")


@pytest.mark.parametrize(("line", "length"), [(2, 1), (3, 0)])
def test_ranking_without_two_completions(required_shared: Path, own: TextEncoder, tmp_path: Path,
                                         line: int, length: int) -> None:
    path = required_shared / "data" / "malformed" / "ranking_one_completion.jsonl"
    lines = path.read_text().split("\n")
    copy = tmp_path / "one.jsonl"
    copy.write_text("\n".join([lines[0]] * (line - 1) + [lines[line - 1]]))
    with pytest.raises(DataError) as caught:
        load_comparisons(copy, own, 512)
    assert str(caught.value).startswith(
        f"{copy}, line {line}, field 'completions': expected at least two completions to compare, "
        f"got a list of length {length}")
    with pytest.raises(DataError, match="line 2, field 'completions'"):
        load_comparisons(path, own, 512)


def test_ranking_that_is_tied_is_counted(required_shared: Path, own: TextEncoder, tmp_path: Path
                                         ) -> None:
    path = required_shared / "data" / "malformed" / "ranking_one_completion.jsonl"
    lines = path.read_text().split("\n")
    copy = tmp_path / "one.jsonl"
    copy.write_text(f"{lines[0]}\n{lines[3]}\n")
    comparisons, report = load_comparisons(copy, own, 512)
    assert [comparison.ranks for comparison in comparisons] == [(0, 1, 2)]
    assert (report.rows, report.kept, report.without_comparison) == (2, 1, 1)
    assert report.summary() == (
        f"{copy}: 1 of 2 rows kept, 1 without a comparison, dropped")


def test_byte_order_mark_and_crlf_are_read(required_shared: Path, own: TextEncoder) -> None:
    path = required_shared / "data" / "malformed" / "bom_crlf.jsonl"
    examples, report = load_demonstrations(path, own, 512)
    assert (report.rows, report.kept) == (3, 3)
    assert [own.decode(example.token_ids) for example in examples] == [
        "What is the capital of France?Paris.", "Name a primary colour.Red.",
        "How many days are in a week?Seven."]


def test_duplicates_are_counted_and_kept(required_shared: Path, own: TextEncoder) -> None:
    path = required_shared / "data" / "malformed" / "duplicate_rows.jsonl"
    examples, report = load_demonstrations(path, own, 512)
    assert (len(examples), report.rows, report.kept, report.duplicates) == (6, 6, 6, 3)
    assert report.sha256 == "ec3f894581c57287be052540b9bf9bdd5827c560ffcd3fe0fc0953299bd190f0"
    assert report.summary() == f"{path}: 6 of 6 rows kept, 3 duplicates"


@pytest.mark.parametrize("load", [load_demonstrations, load_prompts])
def test_prompts_that_are_too_long_are_dropped_and_counted(
        required_shared: Path, own: TextEncoder, tmp_path: Path, load: Callable) -> None:
    path = required_shared / "data" / "malformed" / "long_prompt.jsonl"
    items, report = load(path, own, 1024)
    assert (len(items), report.rows, report.kept, report.dropped_too_long) == (2, 3, 2, 1)
    assert report.summary() == f"{path}: 2 of 3 rows kept, 1 too long, dropped"
    only = tmp_path / "only.jsonl"
    only.write_text(path.read_text().split("\n")[1])
    with pytest.raises(DataError, match="0 of 1 rows kept, 1 too long, dropped: expected at least"):
        load(only, own, 1024)
