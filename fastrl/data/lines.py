"""Lines of text files: UTF-8, plain or compressed, within limits.

Lines end at `\\n` only. `MAX_LINE_BYTES` and `MAX_UNPACKED_BYTES` bound what a hostile file can do.
"""

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from fastrl.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read; a longer one is an error, so that no file can fill the memory."""
MAX_UNPACKED_BYTES = 4 * 2**30
"""Most bytes that a compressed file may unpack to."""
MAX_RATIO, FREE_BYTES = 250, 2 * 2**20
"""Beyond `FREE_BYTES` unpacked, a compressed file may unpack to `MAX_RATIO` times its size: text
reaches 10, the same row over and over 200, and a bomb 1,000."""

_BOM = b"\xef\xbb\xbf"


def row_error(file: str, line: int, problem: str, unit: str = "line") -> DataError:
    """The error that something is wrong in a line (or row, as `unit` says) of a file."""
    return DataError(f"{file}, {unit} {line}, {problem}; correct or remove the row")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of a UTF-8 file, plain or `.gz`; line ends are left out.

    Raises:
        DataError: when the file cannot be read, is not UTF-8, or is beyond the limits above.
    """
    file = str(path)
    total = 0
    check_is_file(file)
    most = MAX_RATIO * os.path.getsize(file)
    with _open(file) as stream:
        number = 0
        while raw := _readline(stream, file, number + 1):
            number += 1
            total += len(raw)
            if file.endswith(".gz") and total > MAX_UNPACKED_BYTES:
                raise DataError(f"{file}: expected at most {MAX_UNPACKED_BYTES:,} bytes unpacked, "
                                "got more; split the file")
            if file.endswith(".gz") and total > max(most, FREE_BYTES):
                raise DataError(f"{file}: expected a compressed file that unpacks to at most "
                                f"{MAX_RATIO} times its size, got more; give it unpacked if it is "
                                "not a bomb")
            yield number, _decode(raw, file, number)


def check_is_file(file: str) -> None:
    """Raise DataError for what is no regular file: a pipe or a device may never end."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise DataError(f"{file}: expected a file that can be read, got {error}; check the path"
                        ) from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{file}: expected a file, got: Is a directory; name the file in it")
    if not stat.S_ISREG(mode):
        raise DataError(f"{file}: expected a regular file, got a pipe or a device; copy it to a "
                        "file")


def _open(file: str) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(file)) if file.endswith(".gz") else open(file, "rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise DataError(f"{file}: expected a file that can be read, got {error}") from error


def _readline(stream: BinaryIO, file: str, number: int) -> bytes:
    try:
        raw = stream.readline(MAX_LINE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}, line {number}: expected a file that can be read to its end, "
                        f"got {error}; fetch or compress it again") from error
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(f"{file}, line {number}: expected at most {MAX_LINE_BYTES:,} bytes in a "
                        "line, got more; is it the format that its name says?")
    return raw


def _decode(raw: bytes, file: str, number: int) -> str:
    """The text of one line without its line end; the first line loses a byte order mark."""
    if number == 1:
        raw = raw.removeprefix(_BOM)
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise row_error(file, number, f"byte {error.start + 1}: expected UTF-8, got the byte "
                        f"0x{raw[error.start]:02X}") from error
