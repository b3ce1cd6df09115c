"""The fields that several loaders share: prompts as text or messages, and completions."""

from fastrl.data.encoder import TextEncoder
from fastrl.data.messages import Message, parse_messages
from fastrl.data.rows import Row, describe
from fastrl.errors import DataError

RowPrompt = str | tuple[Message, ...]
"""A prompt as its row gives it."""


def row_messages(row: Row, field: str) -> tuple[Message, ...]:
    """The conversation in a field; no content but the system's may be blank.

    Raises:
        DataError: when it is malformed.
    """
    messages = parse_messages(row.value.get(field), field, row.error)
    for i, message in enumerate(messages):
        if message.role != "system":
            row.check_text(message.content, f"{field}[{i}].content")
    return messages


def row_prompt(row: Row) -> RowPrompt:
    """The prompt of a row: `prompt` (a text, or messages) or `messages`; not the assistant's turn.

    Raises:
        DataError: when there is none, or it is malformed.
    """
    field = "messages" if "messages" in row.value and "prompt" not in row.value else "prompt"
    if field == "prompt" and not isinstance(row.value.get("prompt"), list):
        return row.text("prompt")
    messages = row_messages(row, field)
    if messages[-1].role == "assistant":
        raise row.error(f"{field}[{len(messages) - 1}].role", "a last message from the user",
                        "'assistant'")
    return messages


def row_completion(row: Row, field: str) -> str:
    """A completion: a text, or a list with one message from the assistant.

    Raises:
        DataError: when it is missing, blank or malformed.
    """
    value = row.value.get(field)
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return row.text(field)
    messages = row_messages(row, field)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise row.error(field, "a text, or one message from the assistant", describe(value))
    return messages[0].content


def prompt_text(prompt: RowPrompt) -> str:
    """What a person reads: the text, or the last user turn."""
    if isinstance(prompt, str):
        return prompt
    turns = [message.content for message in prompt if message.role == "user"]
    return turns[-1] if turns else prompt[-1].content


def encode_row_prompt(row: Row, encoder: TextEncoder, prompt: RowPrompt) -> list[int]:
    """Token ids of a row's prompt.

    Raises:
        DataError: when the chat template refuses it, or nothing is left of it.
    """
    try:
        ids = encoder.encode_prompt(prompt)
    except DataError as error:
        raise _refused(row, prompt, error) from error
    if not ids:
        raise row.error("prompt", "a text that the tokenizer can write", "no tokens")
    return ids


def encode_row_completion(row: Row, encoder: TextEncoder, prompt: RowPrompt, text: str,
                          end: bool = True) -> list[int]:
    """Token ids of a completion that follows a row's prompt, with its end of turn.

    Raises:
        DataError: when the chat template refuses it.
    """
    try:
        return encoder.encode_completion(text, end=end, prompt=prompt)
    except DataError as error:
        raise _refused(row, prompt, error) from error


def _refused(row: Row, prompt: RowPrompt, error: DataError) -> DataError:
    field = "prompt" if isinstance(prompt, str) else "messages"
    return row.error(field, "a conversation that the chat template accepts", str(error))
