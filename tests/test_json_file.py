"""JSON that a stranger wrote: every key once, numbers that exist, a depth that ends."""

import json

import pytest

from fastrl.errors import ModelError
from fastrl.json_file import load_json, parse_json


@pytest.mark.parametrize(("text", "message"), [
    ('{"a": {"b": 1, "b": 2}}', "expected each field once, got field 'b' twice"),
    ("[" * 100_000, "expected at most 64 levels"),
    ("[" * 65 + "]" * 65, "expected at most 64 levels"),
    ("1e999", "expected numbers of at most 1.8e308, got 1e999"),
    ("1" * 5000, "expected whole numbers of at most 4,300 digits"),
    ("NaN", "expected a JSON number, got NaN"),
])
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_what_is_read() -> None:
    assert parse_json("[" * 64 + "]" * 64)
    assert parse_json('[Infinity, {"a": 1.5}]', constants=True) == [float("inf"), {"a": 1.5}]


@pytest.mark.parametrize(("content", "message"), [
    (b'{"model_type": "llama", "model_type": "gpt2"}', "got field 'model_type' twice"),
    (b'{"a": ' + b"[" * 100_000, "expected at most 64 levels"),
    (b"[1]", "expected a JSON object, got list"),
    (b'{"a": "\xff"}', "can't decode byte 0xff"),
    (b'{"a": 1,}', "expected a JSON file"),
])
def test_a_file_that_is_refused_is_named(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_json(path, ModelError)
    assert str(path) in str(caught.value) and "get the file anew" in str(caught.value)


def test_a_folder_in_the_place_of_a_file(tmp_path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match="got a folder or a device"):
        load_json(tmp_path / "config.json", ModelError)


def test_byte_order_mark(tmp_path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert load_json(tmp_path / "a.json", ModelError) == {"a": 1}
