"""JSON in: every key once, numbers that exist, and nothing that nests or counts without end.

Differs from the json module: a key given twice is an error (there the last one wins), and so are
numbers beyond the range of a float and more than `MAX_DEPTH` levels (there the interpreter's stack
is the limit).
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from fastrl.errors import FastRLError

MAX_DEPTH = 64
"""Deepest nesting of lists and objects."""
MAX_FILE_BYTES = 256 * 2**20
"""Largest file that is read at once; the tokenizer.json of a vocabulary of 256,000 takes 35 MB."""


def parse_json(text: str, *, constants: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: One JSON value.
        constants: Read NaN and Infinity, as Python writes them, instead of refusing them.
    Raises:
        json.JSONDecodeError: not JSON; has the place.
        ValueError: a key given twice, too many levels, or a number that none can hold; says what
            was expected and what came.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite,
                           parse_constant=float if constants else _no_constant)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        return value
    except RecursionError:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of lists and objects, got more"
                         ) from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # the interpreter's limit on digits
            raise ValueError("expected whole numbers of at most 4,300 digits, got a longer one"
                             ) from None
        raise


def load_json(path: Path, error: type[FastRLError], advice: str = "get the file anew"
              ) -> dict[str, Any]:
    """Return the object in a JSON file; NaN and Infinity, which Python writes, are read.

    Args:
        path: A regular file of at most `MAX_FILE_BYTES`.
        error: The exception to raise.
        advice: What its message says to do.
    Raises:
        FastRLError: as `error`, when the file cannot be read or is not an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("expected a file, got a folder or a device")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"expected at most {MAX_FILE_BYTES:,} bytes, got "
                             f"{path.stat().st_size:,}")
        value = parse_json(path.read_text(encoding="utf-8-sig"), constants=True)
    except (OSError, ValueError) as problem:
        raise error(f"{path}: expected a JSON file, got: {problem}; {advice}") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}; {advice}")
    return value


def _depth(value: object) -> int:
    """Levels of lists and objects; 0 for a plain value."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (list, dict))]:
        depth += 1
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
    return depth


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"expected each field once, got field {twice!r:.80} twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected numbers of at most 1.8e308, got {text:.40}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a JSON number, got {name}")
