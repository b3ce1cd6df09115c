"""Demonstrations: what a good answer looks like, for supervised fine-tuning."""

from typing import Literal

from fastrl.data.encoder import TextEncoder
from fastrl.data.fields import (
    encode_row_completion,
    encode_row_prompt,
    row_completion,
    row_messages,
    row_prompt,
)
from fastrl.data.report import DataReport, Paths, Tally
from fastrl.data.rows import Row
from fastrl.errors import DataError
from fastrl.types import TokenExample

LossOn = Literal["completion", "all"]


def load_demonstrations(paths: Paths, encoder: TextEncoder, max_tokens: int,
                        loss_on: LossOn = "completion") -> tuple[list[TokenExample], DataReport]:
    """Read and check every demonstration of one or several files.

    A row is `{prompt, completion}` (each a text or messages), `{messages}` with assistant turns,
    or `{text}`, all of which is learned.

    Args:
        paths: A file or several.
        encoder: The model's text encoder.
        max_tokens: Longer examples are dropped and counted.
        loss_on: "completion": what the assistant writes; "all": every token but the first.
    Returns:
        examples, report.
    Raises:
        DataError: at the first broken row, or when no row is left.
    """
    tally = Tally(paths)
    examples = []
    for row in tally.rows():
        ids, loss_mask = _encode(row, encoder)
        if len(ids) > max_tokens:
            tally.num_too_long += 1
            continue
        if loss_on == "all":
            loss_mask = [True] * len(ids)
        loss_mask[0] = False
        source = row.source()
        tally.kept[source] += 1
        examples.append(TokenExample(tuple(ids), tuple(loss_mask), source))
    return examples, tally.report()


def _encode(row: Row, encoder: TextEncoder) -> tuple[list[int], list[bool]]:
    """Token ids and targets of one row."""
    if "completion" in row.value or not ({"messages", "text"} & row.value.keys()):
        prompt = row_prompt(row)
        completion = row_completion(row, "completion")
        prompt_ids = encode_row_prompt(row, encoder, prompt)
        ids = encode_row_completion(row, encoder, prompt, completion)
        return prompt_ids + ids, [False] * len(prompt_ids) + [True] * len(ids)
    if "messages" in row.value:
        return _encode_conversation(row, encoder)
    ids = encoder.encode_document([row.text("text")])
    return ids, [True] * len(ids)


def _encode_conversation(row: Row, encoder: TextEncoder) -> tuple[list[int], list[bool]]:
    messages = row_messages(row, "messages")
    if messages[-1].role != "assistant":
        raise row.error(f"messages[{len(messages) - 1}].role", "a last message from the assistant",
                        repr(messages[-1].role))
    try:
        ids, loss_mask = encoder.encode_conversation(messages)
    except DataError as error:
        raise row.error("messages", "a conversation that the chat template accepts", str(error)
                        ) from error
    if not any(loss_mask[1:]):
        raise row.error("messages", "an assistant turn that the chat template writes out",
                        "a template that leaves it out")
    return ids, loss_mask
