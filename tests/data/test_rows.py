"""Readers: every format, and errors that name file, line and field."""

import gzip
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrl.data import lines, read_rows
from fastrl.errors import DataError


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Writes a file and returns its path."""
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path
    return write


def values(path: Path) -> list[dict[str, object]]:
    return [row.value for row in read_rows(path)]


def error_of(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)
    return str(caught.value).removeprefix(str(path))


LINES = b'{"a": "x"}\n\n  \n{"a": "y"}\n'


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_json_lines(write, name):
    found = list(read_rows(write(name, LINES)))
    assert [(row.line, row.value) for row in found] == [(1, {"a": "x"}), (4, {"a": "y"})]


def test_last_line_needs_no_line_end(write):
    assert values(write("d.jsonl", b'{"a": 1}\n{"a": 2}')) == [{"a": 1}, {"a": 2}]


def test_lines_end_at_line_feed_only(write):
    text = "one\u2028two\u2029three\u0085four\x0b\x0c\x1c"
    content = json.dumps({"a": text}, ensure_ascii=False).encode() + b"\n"
    assert values(write("d.jsonl", content)) == [{"a": text}]


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.txt", "d.json"])
def test_byte_order_mark_and_crlf(write, name):
    content = {"d.jsonl": b'{"text": "x"}\r\n{"text": "y"}\r\n', "d.csv": b"text\r\nx\r\ny\r\n",
               "d.txt": b"x\r\n\r\ny\r\n", "d.json": b'[{"text": "x"},\r\n{"text": "y"}]'}[name]
    assert values(write(name, b"\xef\xbb\xbf" + content)) == [{"text": "x"}, {"text": "y"}]


def test_json_list(write):
    found = list(read_rows(write("d.json", b'[{"a": 1},\n {"a": 2}]')))
    assert [(row.line, row.unit, row.value) for row in found] == [
        (1, "row", {"a": 1}), (2, "row", {"a": 2})]


def test_csv_fields_hold_line_breaks_and_lines_are_counted(write):
    path = write("d.csv", b'a,b\n"x\ny",1\n\n"z ""q""",2\n')
    found = [(row.line, row.value) for row in read_rows(path)]
    assert found == [(2, {"a": "x\ny", "b": "1"}), (5, {"a": 'z "q"', "b": "2"})]


def test_tab_separated(write):
    assert values(write("d.tsv", b"a\tb\nx, y\t2\n")) == [{"a": "x, y", "b": "2"}]


def test_long_csv_field(write):
    assert values(write("d.csv", b"a\n" + b"x" * 200_000 + b"\n")) == [{"a": "x" * 200_000}]


def test_paragraphs(write):
    found = list(read_rows(write("d.txt.gz", b"\none\ntwo\n\n\nthree")))
    assert [(row.line, row.value) for row in found] == [
        (2, {"text": "one\ntwo"}), (6, {"text": "three"})]


@pytest.mark.parametrize(("content", "expected"), [
    (b'{"a": 1}\n{"a": 1,}\n', ", line 2, column 9: expected valid JSON"),
    (b'{"a": "x\n', ", line 1, column 7: expected valid JSON"),
    (b'{"a": 1}\n[1]\n', ", line 2, the row: expected a JSON object, got a list of length 1"),
    (b'{"a": 1}\nnull\n', ", line 2, the row: expected a JSON object, got null"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}\n',
     ", line 1, the row: expected each field once, got field 'c' twice"),
    (b'{"a": 1e999}\n', ", line 1, the row: expected numbers of at most 1.8e308, got 1e999"),
    (b'{"a": NaN}\n', ", line 1, the row: expected a JSON number, got NaN"),
    (b'{"a": -Infinity}\n', ", line 1, the row: expected a JSON number, got -Infinity"),
    (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}\n", ", line 1, the row: expected at most 64 levels"),
    (b'{"a": ' + b"[" * 100_000 + b"\n", ", line 1, the row: expected at most 64 levels"),
    (b'{"a": ' + b"1" * 5000 + b"}\n", ", line 1, the row: "),
    (b'{"a": 1}\n{"a": "\xe9"}\n', ", line 2, byte 8: expected UTF-8, got the byte 0xE9"),
    (b'\xff\xfe{\x00}\x00\n\x00', ", line 1, byte 1: expected UTF-8, got the byte 0xFF"),
    (b"", ": expected at least one row, got none"),
    (b"\n \r\n", ": expected at least one row, got none"),
])
def test_broken_json_lines(write, content, expected):
    assert error_of(write("d.jsonl", content)).startswith(expected)


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("d.json", b'{"a": 1}', ": expected a list of objects, got an object"),
    ("d.json", b'[{"a": 1}, 2]', ", row 2, the row: expected an object, got the number 2"),
    ("d.json", b'[{"a": 1},\n{"a" 2}]', ", line 2, column 6: expected valid JSON"),
    ("d.json", b"[]", ": expected at least one row, got none"),
    ("d.csv", b"a,b\n1,2\n1\n", ", line 3, the row: expected 2 columns, got 1"),
    ("d.csv", b"a,b,a\n1,2,3\n", ", line 1, the header: expected each column once"),
    ("d.csv", b'a\n"x', ", line 2, the row: expected CSV, got: unexpected end of data"),
    ("d.csv", b"a,b\n", ": expected at least one row, got none"),
    ("d.csv", b"a\n1\n\xc3\x28\n", ", line 3, byte 1: expected UTF-8"),
    ("d.txt", b"\n\n", ": expected at least one row, got none"),
    ("d.xml", b"<a/>", ": expected a file that ends in .jsonl, .json"),
    ("d", b"", ": expected a file that ends in .jsonl, .json"),
])
def test_broken_files_of_other_formats(write, name, content, expected):
    assert error_of(write(name, content)).startswith(expected)


def test_compressed_file_that_is_not_or_is_cut_off(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(LINES)
    assert ", line 1: expected a file that can be read to its end" in error_of(path)
    path.write_bytes(gzip.compress(LINES * 1000)[:-20])
    assert "expected a file that can be read to its end" in error_of(path)


def test_compressed_file_that_unpacks_without_end(write, monkeypatch):
    monkeypatch.setattr(lines, "MAX_UNPACKED_BYTES", 10_000)
    path = write("d.jsonl.gz", LINES * 1000)
    assert "expected at most 10,000 bytes unpacked" in error_of(path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("d.jsonl.gz", b"\n" * 8_000_000, "unpacks to at most 250 times its size"),
    ("d.txt.gz", b" " * 100_000_000, "expected at most 67,108,864 bytes in a line"),
])
def test_bombs_end_early(write, name, content, message):
    path = write(name, content)
    assert path.stat().st_size < 100_000
    assert message in error_of(path)


def test_a_whole_json_file_has_a_limit(write, monkeypatch):
    monkeypatch.setattr("fastrl.data.rows.MAX_FILE_BYTES", 100)
    path = write("d.json.gz", b"[" + b'{"a": 1},\n' * 100 + b'{"a": 1}]')
    assert "expected at most 100 characters in a .json file" in error_of(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    for name in ("d.jsonl", "d.parquet", "d.csv.gz"):
        os.mkfifo(tmp_path / name)
        assert "got a pipe or a device" in error_of(tmp_path / name)


def test_names_with_spaces_unicode_and_null(tmp_path):
    folder = tmp_path / "zwei Wörter 日本 'quoted' %s {x}"
    folder.mkdir()
    path = folder / "d a t a.jsonl"
    path.write_bytes(LINES)
    assert values(path) == [{"a": "x"}, {"a": "y"}]
    path.write_bytes(b"{")
    assert ", line 1, column 2: expected valid JSON" in error_of(path)
    assert "embedded null byte" in error_of("a\0b.jsonl")


def test_null_characters_stay_text(write):
    assert values(write("d.jsonl", b'{"a": "x\\u0000y"}')) == [{"a": "x\0y"}]
    assert values(write("d.csv", b"a\nx\0y\n")) == [{"a": "x\0y"}]


def test_parquet_column_twice_and_what_unpacks_to_too_much(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table([["x"], ["y"]], names=["a", "a"]), path)
    assert "expected each column once" in error_of(path)
    bomb = pyarrow.table({"text": ["x" * 2**12] * 1024})
    parquet.write_table(bomb, path)  # 4 MiB in a dictionary of one
    assert path.stat().st_size < 2**15
    monkeypatch.setattr("fastrl.data.rows.MAX_FILE_BYTES", 2**21)
    assert "expected at most 2,097,152 bytes in 1,024 rows" in error_of(path)
    monkeypatch.setattr(lines, "MAX_UNPACKED_BYTES", 1000)
    assert "bytes unpacked in a row group" in error_of(path)


def test_line_without_end(write, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    path = write("d.jsonl.gz", LINES + b" " * 2000)
    assert error_of(path).startswith(", line 5: expected at most 1,000 bytes in a line")


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in error_of(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "Is a directory" in error_of(tmp_path / "folder.jsonl")


def test_parquet_without_pyarrow(write, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install pyarrow" in error_of(write("d.parquet", b""))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    path = tmp_path / "d.parquet"
    table = pyarrow.Table.from_pylist([{"a": "x", "m": [{"role": "user"}]}, {"a": "y", "m": []}])
    parquet.write_table(table, path)
    found = [(row.line, row.unit, row.value) for row in read_rows(path)]
    assert found == [(1, "row", {"a": "x", "m": [{"role": "user"}]}),
                     (2, "row", {"a": "y", "m": []})]
    path.write_bytes(b"not parquet")
    assert ", row 1, the row: expected a parquet file" in error_of(path)


def test_hub_name_without_datasets(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "fastrl-engine[datasets]"' in error_of("datasets:org/name")


def test_hub_name(monkeypatch):
    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        if split == "none":
            raise ValueError("Unknown split")
        return [{"name": name, "split": split}]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert values("datasets:org/name") == [{"name": "org/name", "split": "train"}]
    assert values("datasets:org/name:test") == [{"name": "org/name", "split": "test"}]
    assert "Unknown split" in error_of("datasets:org/name:none")


def test_errors_do_not_show_content(write):
    path = write("d.jsonl", b'{"a": "secret", "b": ["secret"], "c": "\\ud800"}')
    row = next(read_rows(path))
    for field in ("b", "c", "d"):
        with pytest.raises(DataError) as caught:
            row.text(field)
        assert f"line 1, field '{field}': expected" in str(caught.value)
        assert "secret" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10)


@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["d.jsonl", "d.json", "d.csv", "d.tsv", "d.txt", "d.jsonl.gz"]),
       content=st.binary(max_size=200) | st.lists(json_values, max_size=4).map(
           lambda items: "\n".join(map(json.dumps, items)).encode())
       | st.text(alphabet='{}[]":,\n\\u "ad1\r', max_size=60).map(str.encode))
def test_whatever_a_file_holds_only_data_errors_come(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        for row in read_rows(path):
            assert isinstance(row.value, dict)
    except DataError as error:
        assert str(path) in str(error)
