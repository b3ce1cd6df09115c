"""How a rendered conversation is cut: what is encoded together, and what the assistant writes.

A response begins exactly where the prompt before it ends, so there is a cut at the beginning and at
the end of every assistant turn, in training as in generation; no token holds a piece of both sides.
"""

from collections.abc import Collection
from dataclasses import dataclass

from tokenizers import Tokenizer

from fastrl.data.plain import Position, TokenizersErrors
from fastrl.data.template import ChatTemplate, Slot, find_slot, split_slots


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered conversation that is encoded on its own."""

    parts: tuple[int | str | Slot, ...]
    """Added tokens by id, template text, and places of contents."""
    position: Position
    """What stands before the segment."""
    is_target: bool
    """True for what the assistant writes: its content and the token that ends its turn."""

    @property
    def ends_turn(self) -> bool:
        """True when the segment ends in an added token."""
        return bool(self.parts) and isinstance(self.parts[-1], int)


class Layout:
    """The segments of conversations under one chat template.

    They depend on the roles only, so each list of roles is rendered once.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, added_ids: Collection[int]
                 ) -> None:
        """Take the template and the tokenizer that finds added tokens in its text."""
        self._template = template
        self._tokenizer = tokenizer
        self._added_ids = added_ids
        self._known: dict[tuple[tuple[str, ...], bool], tuple[Segment, ...]] = {}

    def segments(self, roles: tuple[str, ...], add_generation_prompt: bool
                 ) -> tuple[Segment, ...]:
        """The segments of a conversation with these roles, in order, none empty.

        Args:
            roles: One role per message.
            add_generation_prompt: End where the assistant's answer begins. Otherwise, after a last
                turn of the assistant, end with the token that ends it.
        Raises:
            DataError: when the template refuses the roles.
        """
        key = roles, add_generation_prompt
        if key not in self._known:
            self._known[key] = self._cut(roles, add_generation_prompt)
        return self._known[key]

    def _cut(self, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[Segment, ...]:
        rendered = self._template.render(roles, add_generation_prompt=add_generation_prompt)
        cuts = self._find_turns(rendered, roles)
        if cuts and roles[-1] == "assistant" and not add_generation_prompt:
            rendered = rendered[:cuts[-1][1]]
        segments: list[Segment] = []
        position: Position = "start"
        edges = [0, *(edge for cut in cuts for edge in cut), len(rendered)]
        for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
            parts = self._parts(rendered[begin:end])
            if parts:
                segments.append(Segment(parts, position, is_target=i % 2 == 1))
                position = "after_token" if isinstance(parts[-1], int) else "after_text"
        return tuple(segments)

    def _find_turns(self, rendered: str, roles: tuple[str, ...]) -> list[tuple[int, int]]:
        """Where each assistant turn begins and ends in the rendered template.

        It begins where a generation prompt for the turns before it ends, if the template agrees
        with itself so far, else at the content. It ends behind the end-of-turn token.
        """
        cuts: list[tuple[int, int]] = []
        last = 0
        for i, role in enumerate(roles):
            found = find_slot(rendered, i, last) if role == "assistant" else None
            if found is None:
                continue
            begin, end = found
            if i > 0:
                before = self._template.render(roles[:i], add_generation_prompt=True)
                if rendered.startswith(before) and last <= len(before) <= begin:
                    begin = len(before)
            last = self._turn_end(rendered, end)
            cuts.append((begin, last))
        return cuts

    def _turn_end(self, rendered: str, end: int) -> int:
        """The end of the added token that follows, if only white space is between."""
        following = split_slots(rendered[end:])[:1]
        if not following or not isinstance(following[0], str):
            return end
        added = self._find_added(following[0])
        if added and not following[0][:added[0][0]].strip():
            return end + added[0][1]
        return end

    def _parts(self, rendered: str) -> tuple[int | str | Slot, ...]:
        parts: list[int | str | Slot] = []
        for piece in split_slots(rendered):
            if isinstance(piece, Slot):
                parts.append(piece)
                continue
            at = 0
            for begin, end, token_id in self._find_added(piece):
                parts += [piece[at:begin]] if begin > at else []
                parts.append(token_id)
                at = end
            parts += [piece[at:]] if at < len(piece) else []
        return tuple(parts)

    def _find_added(self, text: str) -> list[tuple[int, int, int]]:
        """(begin, end, id) of the added tokens in the template's own text."""
        with TokenizersErrors(self._template.name):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [(begin, end, token_id) for (begin, end), token_id
                in zip(encoding.offsets, encoding.ids, strict=True)
                if token_id in self._added_ids]
