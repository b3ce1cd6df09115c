"""Chat templates, rendered with a stand-in for each content.

The template is a Jinja program from a tokenizer folder. It sees the roles and, in place of each
content, one private-use character between two wide spaces. What comes back is the template's own
text with slots in it, so content can be encoded apart from the template: nothing that a user writes
is ever searched for markers, and no condition of the template can be triggered by it. The wide
spaces are gone where a template trims, and then the content is trimmed too.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from fastrl.data.template_limits import MAX_TEMPLATE_CHARACTERS, BoundedEnvironment
from fastrl.errors import DataError, ModelError

PLAIN_FORMAT = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant: ' + message['content'] + eos + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ 'Human: ' + message['content'] + '\\n\\n' }}
{%- else -%}
{{ message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
"""Format of conversations for a tokenizer without a chat template. Its markers are plain text: a
user can write them too, and nothing can tell them apart."""

_PAD = "\u2003"  # EM SPACE: trimmed like any white space, and no template writes it
_FIRST_SLOT = 0x100000  # private use plane 16
_MAX_SLOTS = 0xFFFD


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a content in a rendered template."""

    index: int
    """Which message."""
    trim_left: bool
    trim_right: bool

    def fill(self, content: str) -> str:
        """The content as the template wants it."""
        content = content.lstrip() if self.trim_left else content
        return content.rstrip() if self.trim_right else content


class ChatTemplate:
    """A chat template that can be rendered for a list of roles."""

    def __init__(self, source: str, names: dict[str, str], name: str) -> None:
        """Compile the template.

        Args:
            source: The Jinja text.
            names: Variables of the template, such as `bos_token`.
            name: The tokenizer's name in errors.
        Raises:
            ModelError: when it is not a Jinja template.
        """
        self.name = name
        self._names = names
        self._environment = environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = environment.bounded(_tojson)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            if len(source) > MAX_TEMPLATE_CHARACTERS:
                raise TemplateError(f"one of more than {MAX_TEMPLATE_CHARACTERS:,} characters")
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
            raise ModelError(f"{name}: expected a Jinja chat template, got: {error}; correct "
                             "chat_template in the tokenizer's folder") from error

    def render(self, roles: Sequence[str], *, add_generation_prompt: bool) -> str:
        """The template's text for these roles, with stand-ins for the contents.

        Args:
            roles: One role per message.
            add_generation_prompt: End where the assistant's answer begins.
        Raises:
            DataError: when the template refuses the roles, or writes without end.
        """
        if len(roles) > _MAX_SLOTS:
            raise DataError(f"messages: expected at most {_MAX_SLOTS} messages, got {len(roles)}; "
                            "split the conversation")
        messages = [{"role": role, "content": f"{_PAD}{chr(_FIRST_SLOT + i)}{_PAD}"}
                    for i, role in enumerate(roles)]
        try:
            return self._render(messages, add_generation_prompt)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError,
                AttributeError, RecursionError, MemoryError) as error:
            raise DataError(f"messages: the chat template of {self.name} refuses a conversation "
                            f"with the roles {_shown(roles)}: {error}; change the messages or the "
                            "template") from error

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        pieces, length = [], 0
        self._environment.start()
        for piece in self._template.generate(
                **self._names, messages=messages, add_generation_prompt=add_generation_prompt):
            length += len(piece)
            if any(ord(character) >= _FIRST_SLOT + len(messages) for character in piece):
                raise TemplateError("it writes private-use characters of plane 16")
            if length > MAX_TEMPLATE_CHARACTERS:
                raise TemplateError(f"it writes more than {MAX_TEMPLATE_CHARACTERS:,} characters")
            pieces.append(piece)
        return "".join(pieces)


def split_slots(rendered: str) -> list[str | Slot]:
    """The pieces of a rendered template: its own text, and slots for contents."""
    parts: list[str | Slot] = []
    begin = 0
    for i, character in enumerate(rendered):
        if ord(character) < _FIRST_SLOT:
            continue
        padded_left = rendered[begin:i].endswith(_PAD)
        padded_right = rendered[i + 1:i + 2] == _PAD
        parts.append(rendered[begin:i - padded_left])
        parts.append(Slot(ord(character) - _FIRST_SLOT, not padded_left, not padded_right))
        begin = i + 1 + padded_right
    parts.append(rendered[begin:])
    return [part for part in parts if part != ""]


def find_slot(rendered: str, index: int, begin: int = 0) -> tuple[int, int] | None:
    """Where the stand-in of message `index` begins and ends, wide spaces included."""
    at = rendered.find(chr(_FIRST_SLOT + index), begin)
    if at < 0:
        return None
    left = rendered[begin:at].endswith(_PAD)
    right = rendered[at + 1:at + 2] == _PAD
    return at - left, at + 1 + right


def _shown(roles: Sequence[str]) -> str:
    return ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks that transformers knows; their body is
    rendered and the marks mean nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Parse the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(template: str) -> str:
    return datetime.datetime.now().strftime(template)
