"""What was read from data files: counts for people, hashes for lineage."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastrl.data.rows import DATASETS_PREFIX, Row, read_rows
from fastrl.errors import DataError

Paths = str | Path | Sequence[str | Path]
"""One data file, or several that are read one after the other."""


def file_names(paths: Paths) -> list[str]:
    """The names of one or several files.

    Raises:
        DataError: when there is none.
    """
    files = [str(paths)] if isinstance(paths, (str, Path)) else [str(path) for path in paths]
    if not files:
        raise DataError("data: expected at least one file, got none; name a file")
    return files


@dataclass(frozen=True, slots=True)
class DataReport:
    """What came out of one or several data files."""

    file: str
    """The file; several are joined with a comma."""
    rows: int
    """Rows read."""
    kept: int
    """Rows that are trained on."""
    dropped_too_long: int
    """Rows left out because they have too many tokens."""
    truncated_prompts: int
    """Rows kept without the beginning of their prompt (comparisons only)."""
    duplicates: int
    """Rows with the same content as an earlier one, in whatever order of keys; they are kept."""
    without_comparison: int
    """Rankings left out because nothing in them is better than anything else."""
    by_source: Mapping[str, int] = field(default_factory=dict)
    """Kept rows by their `source`; rows without one count under an empty text."""
    sha256: str = ""
    """Of the file's bytes; of several files: of their hashes; empty for a hub name."""

    def summary(self) -> str:
        """One line for people."""
        notes = [
            (self.dropped_too_long, "too long, dropped"),
            (self.truncated_prompts, "with the beginning of the prompt cut off"),
            (self.duplicates, "duplicates"),
            (self.without_comparison, "without a comparison, dropped"),
        ]
        parts = [f"{self.kept:,} of {self.rows:,} rows kept"]
        parts += [f"{count:,} {what}" for count, what in notes if count]
        return f"{self.file}: {', '.join(parts)}"


class Tally:
    """Reads files and counts what becomes of their rows; one per loader call."""

    def __init__(self, paths: Paths) -> None:
        """Take the files' names; nothing is read yet."""
        self.files = file_names(paths)
        self.num_rows = 0
        self.num_too_long = 0
        self.num_truncated = 0
        self.num_duplicates = 0
        self.num_without_comparison = 0
        self.kept: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    def rows(self) -> Iterator[Row]:
        """Every row of every file, in order; counts rows and duplicates."""
        for file in self.files:
            for row in read_rows(file):
                self.num_rows += 1
                content = json.dumps(row.value, sort_keys=True, default=str)
                digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
                self.num_duplicates += digest in self._seen
                self._seen.add(digest)
                yield row

    def report(self) -> DataReport:
        """The counts.

        Raises:
            DataError: when no row was kept.
        """
        result = DataReport(
            file=", ".join(self.files),
            rows=self.num_rows,
            kept=self.kept.total(),
            dropped_too_long=self.num_too_long,
            truncated_prompts=self.num_truncated,
            duplicates=self.num_duplicates,
            without_comparison=self.num_without_comparison,
            by_source=dict(sorted(self.kept.items())),
            sha256=_hash_files(self.files),
        )
        if result.kept == 0:
            raise DataError(f"{result.summary()}: expected at least one usable row; raise the "
                            "limit on tokens or use other data")
        return result


def _hash_files(files: Sequence[str]) -> str:
    """SHA-256 in hex of one file, or of the hashes of several."""
    hashes = []
    for file in files:
        if file.startswith(DATASETS_PREFIX):
            return ""
        with open(file, "rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
