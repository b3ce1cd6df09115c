"""Where a result came from: SHA-256 of every input and setting, and what changed since.

A stage's lineage is a plain mapping, written to its `run.json`:

    kind            stage kind
    format_version  FORMAT_VERSION when it was made
    config          every setting, paths as the recipe names them, without the output folder
                    and when checkpoints are saved
    inputs          path as the recipe names it -> SHA-256 of the file or folder

Equal lineage means equal results, so a finished stage is skipped exactly when nothing in it
changed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastrl.errors import DataError

FORMAT_VERSION = 1
"""Raised when the same settings and inputs begin to give other results."""

_WITHOUT_EFFECT = frozenset({"output_dir", "save_steps", "save_minutes", "save_total_limit"})
"""Settings that no result depends on."""
_CHUNK_BYTES = 1 << 20


def hash_path(path: Path | str) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's files.

    Raises:
        DataError: when there is nothing at that path.
    """
    path = Path(path)
    if path.is_file():
        return _hash_file(path)
    if not path.is_dir():
        raise DataError(f"{path}: expected a file or folder, found nothing there; check the path")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {_hash_file(file)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def make_lineage(kind: str, config: Mapping[str, Any], inputs: Mapping[str, Path]
                 ) -> dict[str, Any]:
    """Return the lineage of a stage that is about to run.

    Args:
        kind: Stage kind.
        config: Settings as plain values; `output_dir` and `save_*` are left out.
        inputs: Path as the recipe names it -> where it is.
    Raises:
        DataError: when an input does not exist.
    """
    return {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "config": {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT},
        "inputs": {name: hash_path(path) for name, path in sorted(inputs.items())},
    }


def lineage_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting or input that differs; no line means nothing changed."""
    return [f"{name}: {old} -> {new}" for name, old, new in _differences(before, now, "")]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str
                 ) -> Iterator[tuple[str, str, str]]:
    """(dotted name, old, new) of the leaves in which two nested mappings differ."""
    for key in [*before, *(key for key in now if key not in before)]:
        name, old, new = prefix + key, before.get(key, "absent"), now.get(key, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            separator = " " if name == "inputs" else "."
            yield from _differences(old, new, "" if name == "config" else name + separator)
        elif old != new:
            yield name, _short(old), _short(new)


def _short(value: object) -> str:
    """Hashes by their first digits, everything else as it is written."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
