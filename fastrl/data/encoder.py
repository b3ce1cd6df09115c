"""Text to token ids and back, with content kept apart from the chat template.

A conversation is rendered with stand-ins for its contents (`fastrl.data.template`). Only the
template's own text is searched for added tokens; between two of them, template text and content are
joined and encoded together by a tokenizer that knows no added tokens (`fastrl.data.plain`). So the
ids are those that the model was trained on, and a marker inside a content is spelled as text.

The response begins exactly where the prompt ends: both are encoded on their own, in training as in
generation, and a token never holds a piece of each.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastrl.data.folder import TOKENIZER_FILES, TokenizerFolder, read_folder
from fastrl.data.layout import Layout, Segment
from fastrl.data.messages import Message, Messages, parse_messages
from fastrl.data.plain import PlainTokenizer, Position, TokenizersErrors
from fastrl.data.template import PLAIN_FORMAT, ChatTemplate, Slot
from fastrl.errors import DataError, ModelError

PromptFormat = Literal["auto", "text", "chat"]
"""What a prompt given as one text is: "chat" makes it a user message, "text" leaves it as it is,
"auto" is chat where the tokenizer has a chat template."""


class TextEncoder:
    """The tokenizer and chat template of a model."""

    def __init__(self, folder: TokenizerFolder, prompt_format: PromptFormat = "auto") -> None:
        """Build the encoder; see `load_encoder`."""
        self._folder = folder
        self._tokenizer = folder.tokenizer
        self._plain = PlainTokenizer(folder.tokenizer_json, folder.added_ids, str(folder.path))
        names = dict(folder.named_tokens)
        self.has_chat_template = folder.chat_template is not None
        """True when the tokenizer brings a chat template."""
        self.prompt_format = prompt_format
        """What a prompt given as one text is."""
        self.path = folder.path
        """The folder the encoder was loaded from."""
        self.bos_token_id = self.id_of(names.get("bos_token"))
        """Id of the begin-of-text token, or None."""
        self.eos_token_id = self.id_of(names.get("eos_token"))
        """Id of the end-of-text token, or None."""
        self.pad_token_id = self.id_of(names.get("pad_token"))
        """Id of the padding token, or None; fastrl itself never pads."""
        source = folder.chat_template
        if source is None:
            source = PLAIN_FORMAT
            names["eos"] = names.get("eos_token", "")
        template = ChatTemplate(source, names, str(folder.path))
        self._layout = Layout(template, folder.tokenizer, folder.added_ids)
        self._bos_ids = self._find_bos_ids()
        self.eos_token_ids = self._find_eos_ids()
        """Tokens that end a response: of the template's turn, the tokenizer, and
        generation_config.json, in this order."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def max_token_id(self) -> int:
        """The highest id; a model needs at least one more row than this."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def added_token_ids(self) -> frozenset[int]:
        """Ids of the added vocabulary, which never come out of content."""
        return self._folder.added_ids

    def id_of(self, token: str | None) -> int | None:
        """Id of a token given by its text, or None when there is no such token."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode_text(self, text: str, position: Position = "start") -> list[int]:
        """Token ids of plain text: no BOS, no EOS, and no added token whatever the text says.

        Equal to what the tokenizer gives without special tokens, for text that holds none.

        Args:
            text: Any Unicode text.
            position: What stands before it: nothing, an added token, or other text. After other
                text, no space is put in front.
        Raises:
            DataError: when the text holds half of a surrogate pair.
        """
        return self._plain.encode(text, position)

    def encode_texts(self, texts: Sequence[str], position: Position = "start") -> list[list[int]]:
        """Token ids of many plain texts; as `encode_text`, on all cores."""
        return self._plain.encode_batch(list(texts), position)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Token ids of a prompt, up to where the response begins.

        A text becomes one user message, or stays plain text after BOS (`prompt_format`). Messages
        go through the chat template, or without one through
        `fastrl.data.template.PLAIN_FORMAT`.

        Raises:
            DataError: when messages are malformed or the template refuses them.
        """
        messages = self._as_messages(prompt)
        if messages is None:
            assert isinstance(prompt, str)
            return self._bos_ids + self.encode_text(prompt)
        ids: list[int] = []
        for segment in self._layout.segments(tuple(m.role for m in messages), True):
            ids += self._encode_segment(segment, messages)
        return self._with_bos(ids)

    def encode_completion(self, text: str, end: bool = True, prompt: str | Messages = ""
                          ) -> list[int]:
        """Token ids of a completion, as the model would write it after `encode_prompt(prompt)`.

        Args:
            text: The completion.
            end: End as a finished response does: with the template's end-of-turn token, or EOS.
            prompt: What it continues; only its form matters (text or messages, and their roles).
        """
        messages = self._as_messages(prompt)
        if messages is None:
            ids = self.encode_text(text, "after_text")
            return ids + self._eos() if end else ids
        messages = (*messages, Message("assistant", text))
        segment = self._layout.segments(tuple(m.role for m in messages), False)[-1]
        if not segment.is_target:
            raise DataError(f"messages: the chat template of {self.path} leaves out the "
                            "assistant's answer; use another template")
        ids = self._encode_segment(segment, messages)
        if end:
            return ids if segment.ends_turn else ids + self._eos()
        return ids[:-1] if segment.ends_turn else ids

    def encode_conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them the assistant writes.

        Returns:
            ids, loss_mask: as long as each other. True at the tokens from where each response
            begins to the token that ends the turn. Text that the template puts behind the last
            response is left out: nothing learns from it.
        Raises:
            DataError: when messages are malformed or the template refuses them.
        """
        parsed = parse_messages(messages, "messages", _fail)
        ids: list[int] = []
        loss_mask: list[bool] = []
        segments = self._layout.segments(tuple(m.role for m in parsed), False)
        for segment in segments:
            new = self._encode_segment(segment, parsed)
            if segment is segments[-1] and segment.is_target and not segment.ends_turn:
                new += self._eos()
            ids += new
            loss_mask += [segment.is_target] * len(new)
        with_bos = self._with_bos(ids)
        return with_bos, [False] * (len(with_bos) - len(ids)) + loss_mask

    def encode_document(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of a plain text given in pieces: BOS, the pieces end to end, EOS.

        Where BOS and EOS are one token, as in GPT-2, it only ends the document.
        """
        ids = [] if self._bos_ids == self._eos() else list(self._bos_ids)
        first = self.encode_text(pieces[0]) if pieces else []
        for new in (first, *self.encode_texts(pieces[1:], "after_text")):
            ids += new
        return ids + self._eos()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids.

        Args:
            ids: Token ids; ids beyond the vocabulary give no text.
            skip_special_tokens: Leave out added tokens that are flagged special.
        """
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, special or not."""
        return self.decode([token_id], skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Copy the tokenizer's files into another folder, byte for byte."""
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() == self.path.resolve():
            return
        for name in TOKENIZER_FILES:
            if (self.path / name).exists():
                shutil.copyfile(self.path / name, target / name)

    def _as_messages(self, prompt: str | Messages) -> tuple[Message, ...] | None:
        """The prompt as messages, or None where it is plain text."""
        if not isinstance(prompt, str):
            return parse_messages(prompt, "messages", _fail)
        is_chat = self.prompt_format == "chat" or (
            self.prompt_format == "auto" and self.has_chat_template)
        return (Message("user", prompt),) if is_chat else None

    def _eos(self) -> list[int]:
        return [] if self.eos_token_id is None else [self.eos_token_id]

    def _with_bos(self, ids: list[int]) -> list[int]:
        """A chat template writes BOS itself; the plain format leaves it to the tokenizer."""
        return ids if self.has_chat_template else self._bos_ids + ids

    def _find_bos_ids(self) -> list[int]:
        """What the tokenizer puts in front of a text."""
        if self._folder.adds_bos is not None and self.bos_token_id is not None:
            return [self.bos_token_id] if self._folder.adds_bos else []
        with TokenizersErrors(str(self.path)):
            encoding = self._tokenizer.encode("a", add_special_tokens=True)
        mask = list(encoding.special_tokens_mask)
        return list(encoding.ids[:mask.index(0)]) if 0 in mask else []

    def _find_eos_ids(self) -> tuple[int, ...]:
        ids: list[int] = []
        try:
            last = self._layout.segments(("user", "assistant"), False)[-1]
        except DataError:  # a template for other roles
            last = None
        if last is not None and last.is_target and last.ends_turn:
            ids += [part for part in last.parts[-1:] if isinstance(part, int)]
        return tuple(dict.fromkeys([*ids, *self._eos(), *self._folder.eos_token_ids]))

    def _encode_segment(self, segment: Segment, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        text, position = "", segment.position
        for part in segment.parts:
            if isinstance(part, int):
                ids += self.encode_text(text, position) if text else []
                ids.append(part)
                text, position = "", "after_token"
            elif isinstance(part, Slot):
                text += part.fill(messages[part.index].content)
            else:
                text += part
        return ids + self.encode_text(text, position) if text else ids


def _fail(field: str, expected: str, got: str) -> DataError:
    return DataError(f"{field}: expected {expected}, got {got}; correct the messages")


def load_encoder(path: str | Path, prompt_format: PromptFormat = "auto") -> TextEncoder:
    """Load the tokenizer and chat template of a model folder.

    Args:
        path: A folder in the Hugging Face layout.
        prompt_format: What a prompt given as one text is: a user message ("chat"), plain text
            ("text"), or a user message where there is a chat template ("auto").
    Raises:
        ModelError: when the folder holds no tokenizer that can be read.
    Example:
        >>> encoder = load_encoder("shared/models/stories260k")       # doctest: +SKIP
        >>> encoder.encode_prompt("Once upon a time")                 # doctest: +SKIP
        [1, 403, 407, 261, 378]
    """
    if prompt_format not in ("auto", "text", "chat"):
        raise ModelError(f"prompt_format: expected auto, text or chat, got {prompt_format!r}")
    return TextEncoder(read_folder(path), prompt_format)
