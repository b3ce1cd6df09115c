"""Text of a growing token list, in pieces that are complete UTF-8."""

from collections.abc import Sequence
from typing import Protocol

CONTEXT_TOKENS = 6
"""Tokens decoded before a piece, so that the tokenizer joins words as it would in the whole."""
REPLACEMENT = "\ufffd"
"""What a tokenizer returns for bytes that are not a complete character."""


class Decoder(Protocol):
    """The part of a text encoder that the engine uses."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...


class TextPieces:
    """Turns tokens into text one at a time.

    Args:
        decoder: Has `decode(ids) -> str`.
        prompt: Token ids before the first piece.
        stop_strings: Texts to look for.
    """

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], stop_strings: Sequence[str] = ()
    ) -> None:
        self._decoder = decoder
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._begin, self._end = 0, len(self._ids)
        self._stop_strings = tuple(stop_strings)
        self._keep = max((len(s) for s in stop_strings), default=1) - 1
        self._tail = ""
        self.has_stopped = False
        """True once a stop string is part of the text."""

    def push(self, token_id: int) -> str:
        """The text that is complete with one more token; empty inside a character."""
        self._ids.append(token_id)
        before = self._decoder.decode(self._ids[self._begin : self._end])
        after = self._decoder.decode(self._ids[self._begin :])
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return self._given(after[len(before) :])

    def flush(self) -> str:
        """What is left when no token follows, incomplete characters replaced."""
        before = self._decoder.decode(self._ids[self._begin : self._end])
        after = self._decoder.decode(self._ids[self._begin :])
        self._begin = self._end = len(self._ids)
        return self._given(after[len(before) :])

    def _given(self, piece: str) -> str:
        """`piece`, after looking for stop strings that end in it."""
        window = self._tail + piece
        self.has_stopped = self.has_stopped or any(s in window for s in self._stop_strings)
        self._tail = window[len(window) - self._keep :] if self._keep else ""
        return piece
