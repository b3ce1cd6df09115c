"""Tokenizers that read text as text: no added token can come out of them.

A Hugging Face tokenizer first cuts its added tokens (`<|im_end|>`, `</s>`, ...) out of the text and
then splits the rest with its model. Here the first step is gone: `added_tokens` is emptied. Some
models (Unigram, WordLevel, WordPiece, BPE with `ignore_merges`) also find those tokens in their own
vocabulary, so there their entries are renamed to a random text that no input contains, and merges
that lead to them are removed. What is left spells the marker in ordinary pieces.

Where a text continues another one, the tokenizer must not put its usual space in front. `Position`
says what stands before a text; each position has its own tokenizer where that makes a difference.
"""

import copy
import json
import secrets
from collections.abc import Collection
from typing import Any, Literal

from tokenizers import Tokenizer

from fastrl.errors import DataError, ModelError

Position = Literal["start", "after_token", "after_text"]
"""Before the text comes nothing, an added token, or other text."""
POSITIONS: tuple[Position, ...] = ("start", "after_token", "after_text")


class TokenizersErrors:
    """Context that turns the bare `Exception` of the tokenizers package into a ModelError."""

    def __init__(self, name: str) -> None:
        """Take the tokenizer's name for the message."""
        self.name = name

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        """Raise the ModelError; other exception classes pass."""
        if kind is Exception:
            raise ModelError(f"{self.name}: expected a tokenizer that the package tokenizers can "
                             f"run, got: {error}; save the tokenizer again")


class PlainTokenizer:
    """Encodes text without ever producing an added token.

    The one exception is the unknown token, where the model has no other way to write a character
    (a WordLevel model and a word it does not know, for example).
    """

    def __init__(self, tokenizer_json: dict[str, Any], added_ids: Collection[int],
                 name: str) -> None:
        """Build the tokenizers of the three positions.

        Args:
            tokenizer_json: The parsed tokenizer.json; not changed.
            added_ids: Ids of the added vocabulary, none of which may come out.
            name: The tokenizer's name in errors.
        Raises:
            ModelError: when the tokenizer cannot be built.
        """
        self.name = name
        base = {**tokenizer_json, "added_tokens": [], "post_processor": None,
                "truncation": None, "padding": None,
                "model": _without_ids(tokenizer_json.get("model"), frozenset(added_ids))}
        self._tokenizers: dict[Position, Tokenizer] = {}
        built: dict[str, Tokenizer] = {}
        for position in POSITIONS:
            front = {key: _without_prefix(base.get(key), position)
                     for key in ("normalizer", "pre_tokenizer")}
            key = json.dumps(front)
            if key not in built:
                with TokenizersErrors(name):
                    built[key] = Tokenizer.from_str(json.dumps({**base, **front}))
            self._tokenizers[position] = built[key]

    def encode(self, text: str, position: Position = "start") -> list[int]:
        """Token ids of a text.

        Raises:
            DataError: when the text holds half of a surrogate pair.
            ModelError: when the model can write neither the text nor an unknown token.
        """
        return self.encode_batch([text], position)[0]

    def encode_batch(self, texts: list[str], position: Position = "start") -> list[list[int]]:
        """Token ids of each text; as `encode`, on all cores."""
        try:
            with TokenizersErrors(self.name):
                encodings = self._tokenizers[position].encode_batch_fast(
                    texts, add_special_tokens=False)
        except TypeError as error:
            raise DataError("text: expected Unicode text, got half of a surrogate pair (\\ud800 to "
                            "\\udfff); remove it") from error
        return [encoding.ids for encoding in encodings]


def _without_ids(model: Any, added_ids: frozenset[int]) -> Any:
    """The tokenizer's model, with the entries of `added_ids` out of reach."""
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        return model
    model = {**model, "dropout": None} if model.get("dropout") else dict(model)
    secret = secrets.token_hex(16)
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...], the index is the id
        model["vocab"] = [[f"{secret}{i}", score] if i in added_ids else [piece, score]
                          for i, (piece, score) in enumerate(vocab)]
        return model
    renamed = {piece: f"{secret}{i}" for piece, i in vocab.items() if i in added_ids}
    model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocab.items()}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if renamed and model.get("merges"):
        model["merges"] = _merges_without(model, renamed)
    return model


def _merges_without(model: dict[str, Any], removed: Collection[str]) -> list[Any]:
    """The merges that neither use nor make a removed piece."""
    prefix = model.get("continuing_subword_prefix") or ""
    gone = frozenset(removed)
    kept = []
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if gone.isdisjoint((left, right, left + right.removeprefix(prefix))):
            kept.append(merge)
    return kept


def _without_prefix(part: Any, position: Position) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front of a text in this position."""
    if not isinstance(part, dict) or position == "start":
        return part
    part = copy.deepcopy(part)
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            inner = [_without_prefix(item, position) for item in part[name]]
            part[name] = [item for item in inner if item is not None]
    match part.get("type"):
        case "Prepend" if position == "after_text":
            return None
        case "Metaspace" if position == "after_text" or part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
        case "ByteLevel" if position == "after_text":
            part["add_prefix_space"] = False
    return part
