"""Plain text in windows of equal length, for pretraining and the pretraining mix of PPO."""

from collections.abc import Iterator

from fastrl.data.encoder import TextEncoder
from fastrl.data.lines import read_lines
from fastrl.data.report import Paths, file_names
from fastrl.data.rows import read_rows
from fastrl.errors import ConfigError, DataError
from fastrl.types import TokenExample


def load_text_windows(paths: Paths, encoder: TextEncoder, window: int) -> list[TokenExample]:
    """Cut text into windows of token ids.

    A `.txt` file is one document; in the other formats each row's `text` is one. Documents are laid
    end to end, each between BOS and EOS where the tokenizer has them. A window begins with the last
    token of the one before, so every token but the very first is a target exactly once.

    Args:
        paths: A file or several.
        encoder: The model's text encoder.
        window: Tokens per window, at least 2; the last one can be shorter.
    Raises:
        DataError: when a file is broken or holds no text.
        ConfigError: when `window` is below 2.
    """
    if window < 2:
        raise ConfigError(f"window: expected at least 2 tokens, got {window}; change window")
    files = file_names(paths)
    ids: list[int] = []
    for pieces in _documents(files):
        ids += encoder.encode_document(pieces)
    windows = [ids[begin:begin + window] for begin in range(0, len(ids) - 1, window - 1)]
    if not windows:
        raise DataError(f"{', '.join(files)}: expected at least two tokens of text, got "
                        f"{len(ids)}; use a longer file")
    return [TokenExample(tuple(w), (False, *[True] * (len(w) - 1))) for w in windows]


def _documents(files: list[str]) -> Iterator[list[str]]:
    """The documents of the files, each in pieces that are encoded apart."""
    for file in files:
        if file.removesuffix(".gz").endswith(".txt"):
            yield _paragraphs(file)
        else:
            yield from ([row.text("text")] for row in read_rows(file))


def _paragraphs(file: str) -> list[str]:
    """A text file in pieces that end with the blank lines between paragraphs."""
    pieces: list[str] = []
    lines: list[str] = []
    for _, text in read_lines(file):
        if text.strip() and lines and not lines[-1].strip():
            pieces.append("\n".join(lines) + "\n")
            lines = []
        lines.append(text)
    text = "\n".join(lines).rstrip()
    return [*pieces, text] if text else pieces
