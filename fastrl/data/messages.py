"""Conversations: lists of `{"role", "content"}`, checked once and plain afterwards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastrl.data.rows import describe, is_unicode
from fastrl.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""A role is written into the template's own text, so it must be one of these."""

Fail = Callable[[str, str, str], DataError]
"""(field, expected, got) -> the error to raise."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Messages = Sequence[Message] | Sequence[Mapping[str, Any]]
"""What callers may pass: messages, or dicts with `role` and `content`."""


def parse_messages(value: object, field: str, fail: Fail) -> tuple[Message, ...]:
    """A conversation from plain values.

    Content is a text or a list of text parts `{"type": "text", "text": str}`, which are joined.

    Args:
        value: The list.
        field: Its name in errors.
        fail: Makes the error, so that it can name file and line.
    Raises:
        DataError: when a role is unknown, a content is missing or not text, or nothing is there.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise fail(field, "a list of messages", describe(value))
    return tuple(_parse(message, f"{field}[{i}]", fail) for i, message in enumerate(value))


def _parse(value: object, field: str, fail: Fail) -> Message:
    if isinstance(value, Message):
        value = value._asdict()
    if not isinstance(value, Mapping):
        raise fail(field, "an object with role and content", describe(value))
    for name in ("role", "content"):
        if name not in value:
            raise fail(f"{field}.{name}", "a text", "nothing: the field is missing")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        got = repr(role)[:40] if isinstance(role, str) else describe(role)
        raise fail(f"{field}.role", f"one of {', '.join(ROLES)}", got)
    return Message(role, _parse_content(content, f"{field}.content", fail))


def _parse_content(value: object, field: str, fail: Fail) -> str:
    if isinstance(value, list) and value:
        parts = [_parse_part(part, f"{field}[{i}]", fail) for i, part in enumerate(value)]
        return "".join(parts)
    if not isinstance(value, str):
        raise fail(field, "a text", describe(value))
    if not is_unicode(value):
        raise fail(field, "Unicode text", "half of a surrogate pair (\\ud800 to \\udfff)")
    return value


def _parse_part(value: object, field: str, fail: Fail) -> str:
    if not isinstance(value, Mapping) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, Mapping) else None
        got = f"a part of type {kind!r:.40}" if isinstance(kind, str) else describe(value)
        raise fail(field, 'a text part {"type": "text", "text": ...} (fastrl reads text only)', got)
    text = value.get("text")
    if not isinstance(text, str):
        raise fail(f"{field}.text", "a text", describe(text))
    return _parse_content(text, f"{field}.text", fail)
