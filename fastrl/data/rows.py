"""Rows of data files: one reader for every format, and errors that name file, line and field.

Lines end at `\\n` only. Every reader is a generator: the error of row n comes when row n is asked
for, so a caller that must not start on broken data reads the whole file first.
"""

import csv
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.data import lines
from fastrl.data.lines import check_is_file, read_lines, row_error
from fastrl.errors import DataError
from fastrl.json_file import MAX_FILE_BYTES, parse_json

DATASETS_PREFIX = "datasets:"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and the place it came from."""

    file: str
    line: int
    """Where the row begins, counted from 1: a line, or a row for formats without lines."""
    value: dict[str, Any]
    unit: str = "line"
    """What `line` counts: "line" or "row"."""

    def error(self, field: str, expected: str, got: str) -> DataError:
        """The error that this row's `field` is not what was expected."""
        return row_error(self.file, self.line, f"field {field!r}: expected {expected}, got {got}",
                         self.unit)

    def text(self, field: str) -> str:
        """The text in `field`.

        Raises:
            DataError: when it is missing, not a text, blank, or not valid Unicode.
        """
        return self.check_text(self.value.get(field, _MISSING), field)

    def check_text(self, value: object, field: str) -> str:
        """`value` if it is a text that is not blank; `field` is its name in errors.

        Raises:
            DataError: when it is anything else.
        """
        if not isinstance(value, str):
            raise self.error(field, "a text", describe(value))
        if not value.strip():
            raise self.error(field, "a text that is not blank", describe(value))
        if not is_unicode(value):
            raise self.error(field, "Unicode text", "half of a surrogate pair (\\ud800 to \\udfff)")
        return value

    def source(self) -> str:
        """The row's `source`, or an empty text.

        Raises:
            DataError: when there is a `source` that is not a text.
        """
        value = self.value.get("source", "")
        if not isinstance(value, str):
            raise self.error("source", "a text", describe(value))
        return value


class _Missing:
    """Marks a field that is not there, as opposed to one that is null."""


_MISSING = _Missing()


def is_unicode(text: str) -> bool:
    """False when the text holds half of a surrogate pair, which no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def describe(value: object) -> str:
    """What a value is, in words and without its content (data can be private or offensive)."""
    match value:
        case _Missing():
            return "nothing: the field is missing"
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value!r:.40}"
        case str() if not value:
            return "an empty text"
        case str():
            return "only white space" if not value.strip() else f"a text of length {len(value)}"
        case list() | tuple():
            return f"a list of length {len(value)}"
        case dict():
            return "an object"
        case _:
            return f"a value of type {type(value).__name__}"


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a data file.

    `.jsonl`, `.json` (a list of objects), `.csv`, `.tsv`, `.txt` (a paragraph is a row with the
    field `text`), each also with `.gz`; `.parquet` with pyarrow installed; and
    `datasets:name[:split]` with the extra `datasets`. UTF-8, with or without byte order mark, line
    ends LF or CR LF; blank lines are skipped.

    Args:
        path: The file.
    Raises:
        DataError: when the file cannot be read, holds no row, or a row is broken; names file,
            line, field or column, what was expected and what came.
    """
    empty = True
    for row in _rows(str(path)):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: expected at least one row, got none; put data into it "
                        "or remove it from the list")


def _rows(file: str) -> Iterator[Row]:
    if file.startswith(DATASETS_PREFIX):
        return _read_datasets(file)
    suffix = Path(file.removesuffix(".gz")).suffix.lower()
    match suffix:
        case ".jsonl":
            return _read_jsonl(file)
        case ".json":
            return _read_json(file)
        case ".csv" | ".tsv":
            return _read_csv(file, "\t" if suffix == ".tsv" else ",")
        case ".txt":
            return _read_paragraphs(file)
        case ".parquet":
            return _read_parquet(file)
    raise DataError(f"{file}: expected a file that ends in {', '.join(SUFFIXES)} (also with .gz), "
                    f"got {suffix or 'no ending'!r}; rename or convert it")


def _read_jsonl(file: str) -> Iterator[Row]:
    for number, text in read_lines(file):
        if not text.strip():
            continue
        value = _parse_json(text, file, number)
        if not isinstance(value, dict):
            raise row_error(file, number, f"the row: expected a JSON object, got {describe(value)}")
        yield Row(file, number, value)


def _read_json(file: str) -> Iterator[Row]:
    parts, length = [], 0
    for _, line in read_lines(file):
        parts.append(line)
        length += len(line)
        if length > MAX_FILE_BYTES:
            raise DataError(f"{file}: expected at most {MAX_FILE_BYTES:,} characters in a .json "
                            "file, which is read at once, got more; convert it to .jsonl")
    text = "\n".join(parts)
    values = _parse_json(text, file, 1) if text.strip() else []
    if not isinstance(values, list):
        raise DataError(f"{file}: expected a list of objects, got {describe(values)}; a file with "
                        "one object a line is named .jsonl")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise row_error(file, number, f"the row: expected an object, got {describe(value)}",
                            "row")
        yield Row(file, number, value, "row")


def _parse_json(text: str, file: str, first_line: int) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise row_error(file, first_line + error.lineno - 1, f"column {error.colno}: expected "
                        f"valid JSON, got: {error.msg}") from error
    except ValueError as error:
        raise row_error(file, first_line, f"the row: {error}") from error


def _read_csv(file: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(lines.MAX_LINE_BYTES)
    reader = csv.reader((text + "\n" for _, text in read_lines(file)), delimiter=delimiter,
                        strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise row_error(file, line, f"the row: expected CSV, got: {error}") from error
        if fields is None:
            return
        if not fields:  # a blank line
            continue
        if names is None:
            names = fields
            if len(set(names)) < len(names):
                raise row_error(file, line, "the header: expected each column once, got one twice")
        elif len(fields) != len(names):
            raise row_error(file, line, f"the row: expected {len(names)} columns, got "
                            f"{len(fields)}")
        else:
            yield Row(file, line, dict(zip(names, fields, strict=True)))


def _read_paragraphs(file: str) -> Iterator[Row]:
    """Paragraphs are separated by blank lines."""
    paragraph: list[str] = []
    first = 0
    for number, text in read_lines(file):
        if text.strip():
            first = first if paragraph else number
            paragraph.append(text)
        elif paragraph:
            yield Row(file, first, {"text": "\n".join(paragraph)})
            paragraph = []
    if paragraph:
        yield Row(file, first, {"text": "\n".join(paragraph)})


def _need(package: str, what: str, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{what}: needs the package {package}, which is not installed; {remedy}")


def _read_parquet(file: str) -> Iterator[Row]:
    _need("pyarrow", file, "pip install pyarrow, or convert the file to .jsonl")
    import pyarrow
    import pyarrow.parquet

    check_is_file(file)
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        _check_parquet(file, table)
        for batch in table.iter_batches(batch_size=1024):
            if batch.nbytes > MAX_FILE_BYTES:
                raise row_error(file, number + 1, f"the row: expected at most {MAX_FILE_BYTES:,} "
                                f"bytes in 1,024 rows, got {batch.nbytes:,}", "row")
            for value in batch.to_pylist():
                number += 1
                yield Row(file, number, value, "row")
    except DataError:
        raise
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise row_error(file, number + 1, f"the row: expected a parquet file, got: {error}",
                        "row") from error


def _check_parquet(file: str, table: Any) -> None:
    """Raise DataError for a column that is there twice, and for what unpacks to too much."""
    names = table.schema_arrow.names
    if len(set(names)) < len(names):
        raise DataError(f"{file}: expected each column once, got one twice; rename it")
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    unpacked = max((group.total_byte_size for group in groups), default=0)
    if unpacked > lines.MAX_UNPACKED_BYTES:
        raise DataError(f"{file}: expected at most {lines.MAX_UNPACKED_BYTES:,} bytes unpacked in "
                        f"a row group, got {unpacked:,}; write it with smaller row groups")


def _read_datasets(file: str) -> Iterator[Row]:
    _need("datasets", file, 'pip install "fastrl-engine[datasets]"')
    import datasets

    name, _, split = file.removeprefix(DATASETS_PREFIX).partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: expected a data set and a split that exist, got: {error}"
                        ) from error
    for number, value in enumerate(rows, 1):
        yield Row(file, number, dict(value), "row")
