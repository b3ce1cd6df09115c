"""Comparisons: completions of one prompt, ranked by people, for the reward model."""

from fastrl.data.encoder import TextEncoder
from fastrl.data.fields import (
    RowPrompt,
    encode_row_completion,
    encode_row_prompt,
    row_completion,
    row_prompt,
)
from fastrl.data.report import DataReport, Paths, Tally
from fastrl.data.rows import Row, describe
from fastrl.types import Comparison


def load_comparisons(paths: Paths, encoder: TextEncoder, max_tokens: int
                     ) -> tuple[list[Comparison], DataReport]:
    """Read and check every comparison of one or several files.

    A row is `{prompt | messages, chosen, rejected}`, or K-way
    `{prompt | messages, completions: [{text, rank}, ...]}` where rank 0 is best and equal ranks are
    ties. A completion whose `finish_reason` is "length", as `fastrl generate` writes it, was cut
    off by a limit and gets no end-of-turn token. A ranking in which nothing is better than anything
    else is left out and counted.

    Args:
        paths: A file or several.
        encoder: The model's text encoder.
        max_tokens: Longest prompt with its longest completion. Beyond it the beginning of the
            prompt is cut off (BOS stays); a row whose completion alone is too long is dropped.
    Returns:
        comparisons, report.
    Raises:
        DataError: at the first broken row, or when no row is left.
    """
    tally = Tally(paths)
    comparisons = []
    for row in tally.rows():
        prompt = row_prompt(row)
        texts, ranks, are_whole = _ranked(row)
        source = row.source()
        if len(set(ranks)) == 1 or len(set(texts)) == 1:
            tally.num_without_comparison += 1
            continue
        prompt_ids, completions = _encode(row, encoder, prompt, texts, are_whole)
        room = max_tokens - max(len(ids) for ids in completions)
        if room < min(2, len(prompt_ids)):
            tally.num_too_long += 1
            continue
        tally.num_truncated += len(prompt_ids) > room
        tally.kept[source] += 1
        comparisons.append(Comparison(
            prompt_ids=tuple(_cut_front(prompt_ids, room, encoder.bos_token_id)),
            completions=tuple(tuple(ids) for ids in completions),
            ranks=tuple(ranks),
            source=source,
            num_characters=tuple(len(text) for text in texts),
        ))
    return comparisons, tally.report()


def _encode(row: Row, encoder: TextEncoder, prompt: RowPrompt, texts: list[str],
            are_whole: list[bool]) -> tuple[list[int], list[list[int]]]:
    prompt_ids = encode_row_prompt(row, encoder, prompt)
    return prompt_ids, [encode_row_completion(row, encoder, prompt, text, end)
                        for text, end in zip(texts, are_whole, strict=True)]


def _cut_front(ids: list[int], room: int, bos_token_id: int | None) -> list[int]:
    """The last `room` ids; a BOS at the front stays."""
    if len(ids) <= room:
        return ids
    if ids[0] == bos_token_id:
        return [ids[0], *ids[len(ids) - room + 1:]]
    return ids[len(ids) - room:]


def _ranked(row: Row) -> tuple[list[str], list[int], list[bool]]:
    """The completions of a row, their ranks, and whether they ended by themselves."""
    if not {"completions", "chosen", "rejected"} & set(row.value):
        raise row.error("completions", "a list of {text, rank}, or the fields chosen and rejected",
                        "none of them")
    if "completions" not in row.value:
        texts = [row_completion(row, "chosen"), row_completion(row, "rejected")]
        return texts, [0, 1], [True, True]
    completions = row.value["completions"]
    if not isinstance(completions, list):
        raise row.error("completions", "a list of {text, rank}", describe(completions))
    if len(completions) < 2:
        raise row.error("completions", "at least two completions to compare",
                        describe(completions))
    texts, ranks, are_whole = [], [], []
    for i, completion in enumerate(completions):
        field = f"completions[{i}]"
        if not isinstance(completion, dict):
            raise row.error(field, "an object with text and rank", describe(completion))
        for name, expected in (("text", "a text"), ("rank", "a whole number from 0 (best)")):
            if name not in completion:
                raise row.error(f"{field}.{name}", expected, "nothing: the field is missing")
        texts.append(row.check_text(completion["text"], f"{field}.text"))
        ranks.append(_rank(row, completion["rank"], f"{field}.rank"))
        are_whole.append(completion.get("finish_reason") != "length")
    return texts, ranks, are_whole


def _rank(row: Row, value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise row.error(field, "a whole number from 0 (best)", describe(value))
    return value
