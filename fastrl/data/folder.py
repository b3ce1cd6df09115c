"""Tokenizer folders in the Hugging Face layout: what is read from them, and nothing executed.

`tokenizer.json` is read directly, which takes milliseconds. A folder without one (slow tokenizers)
goes through transformers, which converts it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fastrl.data.plain import TokenizersErrors
from fastrl.errors import ModelError
from fastrl.json_file import MAX_FILE_BYTES, load_json, parse_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)
"""The files that make a tokenizer; `TextEncoder.save` copies those that are there."""

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token",
          "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFolder:
    """What a tokenizer folder says."""

    path: Path
    tokenizer_json: dict[str, Any]
    """The parsed tokenizer.json."""
    tokenizer: Tokenizer
    """The tokenizer with its whole added vocabulary."""
    named_tokens: Mapping[str, str]
    """`bos_token`, `eos_token` and so on, where the folder names them."""
    added_ids: frozenset[int]
    """Ids of the added vocabulary, flagged special or not, and of the named tokens."""
    chat_template: str | None
    adds_bos: bool | None
    """`add_bos_token` where the folder sets it; None leaves it to the post-processor."""
    eos_token_ids: tuple[int, ...] = field(default=())
    """Stop tokens that generation_config.json names."""


def read_folder(path: str | Path) -> TokenizerFolder:
    """Read a tokenizer folder.

    Raises:
        ModelError: when it is missing, broken, or holds no tokenizer.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: expected a model folder with tokenizer.json, got "
                         f"{'a file' if folder.exists() else 'nothing'}; give the path of a folder")
    config = _read_object(folder / "tokenizer_config.json")
    named = {**_named(_read_object(folder / "special_tokens_map.json")), **_named(config)}
    source = folder / "tokenizer.json"
    text = _read_text(source) if source.exists() else _convert_slow(folder)
    tokenizer_json = _parse(text, source)
    with TokenizersErrors(str(folder)):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, config, folder)
    extra = [*named.values(), *_texts(config.get("additional_special_tokens")),
             *_texts(config.get("extra_special_tokens"))]
    ids = (tokenizer.token_to_id(token) for token in extra)
    adds_bos = config.get("add_bos_token")
    return TokenizerFolder(
        path=folder,
        tokenizer_json=tokenizer_json,
        tokenizer=tokenizer,
        named_tokens=named,
        added_ids=frozenset(tokenizer.get_added_tokens_decoder())
        | frozenset(i for i in ids if i is not None),
        chat_template=_chat_template(folder, config),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        eos_token_ids=_generation_stops(folder),
    )


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a folder or a device")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: expected a file that can be read as UTF-8, got: {error}; copy "
                         "the tokenizer again") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ModelError(f"{path}: expected valid JSON, got: {error}; copy the tokenizer again"
                         ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}; copy the "
                         "tokenizer again")
    return value


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty when there is no such file."""
    return load_json(path, ModelError, "copy the tokenizer again") if path.exists() else {}


def _text(value: object) -> str | None:
    """A token's text: given plainly, or as `{"content": text}`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _texts(values: object) -> list[str]:
    """The texts of several tokens, given as a list or by name."""
    values = list(values.values()) if isinstance(values, dict) else values
    found = [_text(value) for value in values] if isinstance(values, list) else []
    return [text for text in found if text is not None]


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    found = {role: _text(config.get(role)) for role in _ROLES}
    return {role: text for role, text in found.items() if text is not None}


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Add tokens that only tokenizer_config.json or added_tokens.json name, at their own ids."""
    tokens: dict[int, AddedToken] = {}
    plain = _read_object(folder / "added_tokens.json")
    for text, token_id in plain.items():
        if isinstance(token_id, int):
            tokens[token_id] = AddedToken(text, normalized=False)
    decoder = config.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(entry, dict) and _text(entry) and str(key).isdigit():
            flags = {name: bool(entry.get(name)) for name in
                     ("lstrip", "rstrip", "single_word", "normalized", "special")}
            tokens[int(key)] = AddedToken(entry["content"], **flags)
    known = tokenizer.get_added_tokens_decoder()
    for token_id, token in sorted(tokens.items()):
        if token_id in known:
            continue
        tokenizer.add_tokens([token])
        got = tokenizer.token_to_id(token.content)
        if got != token_id:
            raise ModelError(f"{folder}: expected the added token {token.content!r} at id "
                             f"{token_id}, got {got}; save the tokenizer again")


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (file := folder / "chat_template.jinja").exists():
        return _read_text(file)
    template = config.get("chat_template")
    if template is None:
        template = _read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template
                 if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{folder}: expected chat_template to be a text, got "
                         f"{type(template).__name__}; correct tokenizer_config.json")
    return template


def _generation_stops(folder: Path) -> tuple[int, ...]:
    value = _read_object(folder / "generation_config.json").get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _convert_slow(folder: Path) -> str:
    """The tokenizer.json that transformers makes of another tokenizer format."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder}: expected a tokenizer (tokenizer.json), found none; copy the "
                         "tokenizer's files into the folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                  trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder}: expected tokenizer.json, or a tokenizer that transformers can "
                         f"convert, got: {error}; save a tokenizer.json") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder}: {type(tokenizer).__name__} cannot be converted to "
                         "tokenizer.json; use a model with a fast tokenizer")
    text: str = backend.to_str()
    return text
