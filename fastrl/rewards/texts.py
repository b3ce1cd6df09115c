"""Responses as texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from fastrl.types import Prompt, Rollout

if TYPE_CHECKING:
    from fastrl.data import TextEncoder


class TextDecoder(Protocol):
    """The part of `fastrl.data.TextEncoder` that a reward function needs."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens."""


def decode_response(rollout: Rollout, index: int, decoder: TextDecoder) -> str:
    """Text of one response, without the end-of-text token."""
    token_ids = rollout.response(index)
    if token_ids and token_ids[-1] in decoder.eos_token_ids:
        token_ids.pop()
    return decoder.decode(token_ids)


def decode_continuation(
    rollout: Rollout, index: int, encoder: "TextEncoder", prompt: Prompt
) -> str:
    """Text of one response as a data file holds it: read again, it continues its prompt.

    Decoders in the style of SentencePiece drop the space that begins a text. Without it the reward
    model would read ` She` glued to the prompt, in other tokens than the policy writes. And some
    chat templates write that space themselves.

    Args:
        rollout: Responses with their prompts.
        index: Which response.
        encoder: Decodes them, and encodes the text that is returned.
        prompt: What the response answers.
    """
    begin = int(rollout.prompt_lens[index])
    prompt_ids, response_ids = rollout.sequence(index)[:begin], rollout.response(index)
    if response_ids and response_ids[-1] in encoder.eos_token_ids:
        response_ids.pop()
    before, whole = encoder.decode(prompt_ids), encoder.decode(prompt_ids + response_ids)
    alone = encoder.decode(response_ids)
    if not whole.startswith(before):  # a character whose bytes begin in the prompt
        return alone
    text = whole[len(before):]
    form = prompt.row.get("prompt", prompt.row.get("messages", prompt.text))
    for candidate in dict.fromkeys((alone, text, text.removeprefix(" "))):
        again = encoder.encode_completion(candidate, end=False, prompt=form)
        if encoder.decode(prompt_ids + again) == whole:
            return candidate
    return text
