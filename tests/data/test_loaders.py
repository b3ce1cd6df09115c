"""Demonstrations, comparisons and prompts: formats, counts, and what is a target."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrl.data import (
    TextEncoder,
    load_comparisons,
    load_demonstrations,
    load_encoder,
    load_prompts,
    load_text_windows,
)
from fastrl.errors import ConfigError, DataError

USER = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes rows as JSON lines and returns the path."""
    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return write


def targets(encoder: TextEncoder, example: Any) -> str:
    return encoder.decode([t for t, m in zip(example.token_ids, example.loss_mask, strict=True)
                           if m], skip_special_tokens=False)


@pytest.mark.parametrize("row", [
    {"prompt": USER["content"], "completion": "Paris."},
    {"prompt": [USER], "completion": [ANSWER]},
    {"messages": [USER], "completion": "Paris."},
    {"messages": [USER, ANSWER]},
    {"messages": [{**USER, "content": [{"type": "text", "text": USER["content"]}]}, ANSWER]},
])
def test_one_turn_is_the_same_in_every_format(own: TextEncoder, write: Any, row: Any) -> None:
    [example], report = load_demonstrations(write(row | {"source": "s"}), own, 512)
    assert own.decode(example.token_ids, skip_special_tokens=False) == (
        "<|user|>What is the capital of France?<|end|><|assistant|>Paris.<|end|>")
    assert targets(own, example) == "Paris.<|end|>"
    assert example.source == "s" and report.by_source == {"s": 1}


def test_targets_of_a_conversation(own: TextEncoder, write: Any) -> None:
    path = write({"messages": [USER, ANSWER, {**USER, "content": "Why?"},
                               {**ANSWER, "content": "History."}]})
    [example], _ = load_demonstrations(path, own, 512)
    assert targets(own, example) == "Paris.<|end|>History.<|end|>"
    [everything], _ = load_demonstrations(path, own, 512, loss_on="all")
    assert everything.token_ids == example.token_ids
    assert everything.loss_mask == (False, *[True] * (len(example.token_ids) - 1))


def test_plain_text_is_learned_whole(own: TextEncoder, write: Any) -> None:
    [example], _ = load_demonstrations(write({"text": "The end."}), own, 512)
    assert targets(own, example) == " end.<|endoftext|>"


def test_base_model_continues_the_text(required_shared: Path, write: Any) -> None:
    encoder = load_encoder(required_shared / "models" / "stories260k")
    path = write({"prompt": "Once upon a time", "completion": " there was a girl."})
    [example], _ = load_demonstrations(path, encoder, 512)
    assert encoder.decode(example.token_ids) == "Once upon a time there was a girl."
    assert example.token_ids[:5] == (1, 403, 407, 261, 378) and example.token_ids[-1] == 2
    assert targets(encoder, example).startswith("there")


@pytest.mark.parametrize(("row", "expected"), [
    ({}, "field 'prompt': expected a text, got nothing"),
    ({"prompt": "x"}, "field 'completion': expected a text, got nothing"),
    ({"messages": []}, "field 'messages': expected a list of messages, got a list of length 0"),
    ({"messages": "hi"}, "field 'messages': expected a list of messages, got a text"),
    ({"messages": [USER]}, "field 'messages[0].role': expected a last message from the assistant"),
    ({"messages": ["x", ANSWER]}, "field 'messages[0]': expected an object with role and content"),
    ({"messages": [USER, {"role": "assistant"}]}, "field 'messages[1].content': expected a text"),
    ({"messages": [USER, {**ANSWER, "content": " "}]},
     "field 'messages[1].content': expected a text that is not blank"),
    ({"messages": [{"role": "bot<|end|>", "content": "x"}, ANSWER]},
     "field 'messages[0].role': expected one of system, developer, user, assistant, tool"),
    ({"messages": [{"role": "tool", "content": "x"}, ANSWER]},
     "field 'messages': expected a conversation that the chat template accepts"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, ANSWER]},
     "field 'messages[0].content[0]': expected a text part"),
    ({"prompt": [USER, ANSWER], "completion": "x"},
     "field 'prompt[1].role': expected a last message from the user"),
    ({"prompt": "x", "completion": [USER]},
     "field 'completion': expected a text, or one message from the assistant"),
    ({"prompt": "x", "completion": "y", "source": 3}, "field 'source': expected a text"),
    ({"prompt": "\ud800", "completion": "y"}, "field 'prompt': expected Unicode text"),
    ({"text": ""}, "field 'text': expected a text that is not blank"),
])
def test_broken_demonstrations(own: TextEncoder, write: Any, row: Any, expected: str) -> None:
    path = write({"prompt": "x", "completion": "y"}, row)
    with pytest.raises(DataError) as caught:
        load_demonstrations(path, own, 512)
    assert str(caught.value).startswith(f"{path}, line 2, {expected}")


def test_pairs_are_rankings_of_two(own: TextEncoder, write: Any) -> None:
    path = write({"messages": [USER], "chosen": "Paris.", "rejected": "I like cheese."})
    [comparison], _ = load_comparisons(path, own, 512)
    assert comparison.ranks == (0, 1) and comparison.num_characters == (6, 14)
    assert own.decode(comparison.prompt_ids, False) == (
        "<|user|>What is the capital of France?<|end|><|assistant|>")
    assert [own.decode(ids, False) for ids in comparison.completions] == [
        "Paris.<|end|>", "I like cheese.<|end|>"]


def test_rankings_keep_ties_and_order(own: TextEncoder, write: Any) -> None:
    completions = [{"text": "b", "rank": 1, "score": 0.5}, {"text": "a", "rank": 0},
                   {"text": "c", "rank": 1}]
    [comparison], _ = load_comparisons(write({"prompt": "x", "completions": completions}), own, 512)
    assert comparison.ranks == (1, 0, 1)
    assert [own.decode(ids) for ids in comparison.completions] == ["b", "a", "c"]


def test_equal_texts_hold_no_comparison(own: TextEncoder, write: Any) -> None:
    path = write({"prompt": "x", "chosen": "a", "rejected": "a"},
                 {"prompt": "x", "chosen": "a", "rejected": "b"})
    _, report = load_comparisons(path, own, 512)
    assert (report.kept, report.without_comparison) == (1, 1)


def test_only_ties_are_an_error(own: TextEncoder, write: Any) -> None:
    tied = [{"text": "a", "rank": 0}, {"text": "b", "rank": 0}]
    with pytest.raises(DataError, match="0 of 1 rows kept, 1 without a comparison"):
        load_comparisons(write({"prompt": "x", "completions": tied}), own, 512)


def test_long_comparison_loses_the_beginning_of_the_prompt(required_shared: Path, write: Any
                                                           ) -> None:
    encoder = load_encoder(required_shared / "models" / "stories260k")
    prompt = "Once upon a time, there was a little girl named Lily."
    path = write({"prompt": prompt, "chosen": " She", "rejected": " She loved"},
                 {"prompt": prompt, "chosen": " a", "rejected": " She loved to play"},
                 {"prompt": "Once", "chosen": " a", "rejected": " b"})
    comparisons, report = load_comparisons(path, encoder, 8)
    # the rejected completion takes 4 tokens with EOS, so 4 are left: BOS and the prompt's end
    assert comparisons[0].prompt_ids == (1, 395, 317, 426)
    assert (report.kept, report.truncated_prompts, report.dropped_too_long) == (3, 2, 0)
    assert max(len(comparisons[1].prompt_ids) + len(c) for c in comparisons[1].completions) == 8
    _, report = load_comparisons(path, encoder, 6)
    assert (report.kept, report.truncated_prompts, report.dropped_too_long) == (2, 1, 1)


@pytest.mark.parametrize(("row", "expected"), [
    ({"chosen": "a", "rejected": "b"}, "field 'prompt': expected a text, got nothing"),
    ({"prompt": "x", "chosen": "a"}, "field 'rejected': expected a text, got nothing"),
    ({"prompt": "x", "completion": "a"},  # a demonstration
     "field 'completions': expected a list of {text, rank}, or the fields chosen and rejected"),
    ({"prompt": "x", "chosen": "a", "rejected": ""}, "field 'rejected': expected a text that is"),
    ({"prompt": "x", "completions": "ab"}, "field 'completions': expected a list of {text, rank}"),
    ({"prompt": "x", "completions": ["a", "b"]}, "field 'completions[0]': expected an object"),
    ({"prompt": "x", "completions": [{"text": "a", "rank": 0}, {"text": "b"}]},
     "field 'completions[1].rank': expected a whole number from 0 (best), got nothing"),
    ({"prompt": "x", "completions": [{"text": "a", "rank": 0}, {"text": "b", "rank": True}]},
     "field 'completions[1].rank': expected a whole number from 0 (best), got true"),
    ({"prompt": "x", "completions": [{"text": "a", "rank": -1}, {"text": "b", "rank": 0}]},
     "field 'completions[0].rank': expected a whole number from 0 (best), got the number -1"),
    ({"prompt": "x", "completions": [{"text": " ", "rank": 0}, {"text": "b", "rank": 1}]},
     "field 'completions[0].text': expected a text that is not blank"),
])
def test_broken_comparisons(own: TextEncoder, write: Any, row: Any, expected: str) -> None:
    path = write({"prompt": "x", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(DataError) as caught:
        load_comparisons(path, own, 512)
    assert str(caught.value).startswith(f"{path}, line 2, {expected}")


def test_prompts_keep_their_row(own: TextEncoder, write: Any) -> None:
    row = {"prompt": "Hello", "source": "s", "id": "s/1"}
    path = write(row, {"messages": [{"role": "system", "content": ""}, USER, ANSWER, USER]})
    prompts, report = load_prompts(path, own, 512)
    assert own.decode(prompts[0].token_ids, False) == "<|user|>Hello<|end|><|assistant|>"
    assert (prompts[0].text, prompts[0].source, prompts[0].row) == ("Hello", "s", row)
    assert prompts[1].text == USER["content"]
    assert report.by_source == {"": 1, "s": 1}


def test_several_files_are_one_set(own: TextEncoder, write: Any) -> None:
    first = write({"prompt": "a"}, {"prompt": "b"}, name="1.jsonl")
    second = write({"prompt": "b"}, name="2.jsonl")
    prompts, report = load_prompts([first, second], own, 512)
    assert [prompt.text for prompt in prompts] == ["a", "b", "b"]
    assert (report.file, report.duplicates) == (f"{first}, {second}", 1)
    assert len(report.sha256) == 64
    with pytest.raises(DataError, match="expected at least one file, got none"):
        load_prompts([], own, 512)


def test_real_data_is_read_whole(required_shared: Path, own: TextEncoder) -> None:
    data = required_shared / "data"
    _, report = load_comparisons(data / "preferences" / "wmt_zhen_ranked.jsonl.gz", own, 10**6)
    assert (report.rows, report.kept, report.without_comparison) == (479, 405, 74)
    comparisons, report = load_comparisons(data / "preferences" / "oasst_ranked.jsonl", own, 10**6)
    assert (report.rows, report.kept, report.truncated_prompts) == (110, 110, 0)
    assert sorted(len(c.ranks) for c in comparisons)[-5:] == [5, 6, 6, 8, 9]
    _, report = load_demonstrations(data / "sft" / "instructions.jsonl", own, 10**6)
    assert report.by_source == {"oasst": 51, "self_instruct_seed": 175, "user_oriented": 82}


def test_windows_target_every_token_once(own: TextEncoder, tmp_path: Path) -> None:
    text = "The quick brown fox.\n\nJumps over\nthe lazy dog.\n\n\nThen it sleeps."
    path = tmp_path / "text.txt"
    path.write_text(text + "\n")
    windows = load_text_windows(path, own, 8)
    ids = list(windows[0].token_ids)
    for window in windows[1:]:
        assert window.token_ids[0] == ids[-1]
        ids += window.token_ids[1:]
    assert own.decode(ids, skip_special_tokens=False) == text + "<|endoftext|>"
    assert {len(window.token_ids) for window in windows[:-1]} == {8}
    assert all(w.loss_mask == (False, *[True] * (len(w.token_ids) - 1)) for w in windows)


def test_windows_of_documents(own: TextEncoder, required_shared: Path, write: Any) -> None:
    path = write({"text": "One."}, {"text": "Two."})
    [window] = load_text_windows([path], own, 512)
    assert own.decode(window.token_ids, False) == "One.<|endoftext|>Two.<|endoftext|>"
    stories = load_encoder(required_shared / "models" / "stories260k")
    [window] = load_text_windows(path, stories, 512)
    assert stories.decode(window.token_ids, False) == "<s> One.</s><s> Two.</s>"


def test_windows_need_text(own: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="expected at least two tokens of text"):
        load_text_windows(tmp_path / "empty.txt", own, 8)
    with pytest.raises(ConfigError, match="window: expected at least 2 tokens, got 1"):
        load_text_windows(tmp_path / "empty.txt", own, 1)


FIELDS = ["prompt", "messages", "completion", "chosen", "rejected", "completions", "text", "source"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "text", "rank", "type"]), inner, max_size=3),
    max_leaves=8)


@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5), max_size=3))
def test_whatever_rows_hold_only_data_errors_come(own: TextEncoder, tmp_path: Path, rows: Any
                                                  ) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for load in (load_demonstrations, load_comparisons, load_prompts):
        try:
            items, report = load(path, own, 64)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert len(items) == report.kept
