"""Settings files: what is read, and that every mistake names its line."""

from pathlib import Path

import pytest

from fastrl.errors import ConfigError
from fastrl.yaml_file import check_keys, load_yaml, parse_yaml


def test_plain_values_follow_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1e-5\nb: [1, 2.5, 010, 1:30, 2024-01-01, true, null]\nc: {d: .5, e: -3}\n")
    assert load_yaml(path) == {"a": 1e-5, "b": [1, 2.5, "010", "1:30", "2024-01-01", True, None],
                               "c": {"d": 0.5, "e": -3}}


def test_byte_order_mark_and_empty_file(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "bom.yaml") == {"a": 1, "b": 2}
    assert load_yaml(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(("text", "message"), [
    ("a: 1\nb: 2\na: 3\n",
     r"f\.yaml, line 3, column 1: key 'a' is given twice \(first in line 1\)"),
    ("x:\n  a: 1\n  a: 1\n", "line 3, column 3: key 'a' is given twice"),
    ("a: !!python/name:os.system x\n", r"line 1, column 4: tags"),
    ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4: tags"),
    ("a: &x 1\nb: *x\n", "line 2, column 4: aliases"),
    ("1: 2\n", "line 1, column 1: a key must be plain text"),
    ("a: [\n", "f.yaml, line 2"),
    ("a: @sft\n", "line 1, column 4: found character '@'.*put it in quotes"),
    ("a: \x01", "not valid YAML"),
    ("[" * 5000, "nests deeper than can be read"),
    ("a: " + "1" * 5000, "expected numbers of at most 4,300 digits"),
])
def test_mistakes_name_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "f.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read this file"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines at the top, got a list"):
        load_yaml(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(ConfigError, match="expected UTF-8 text, got byte 0xe9 at offset 6"):
        load_yaml(tmp_path / "latin.yaml")


def test_unknown_keys_name_the_nearest() -> None:
    check_keys(["kl_coef"], ["kl_coef", "gamma"], "recipe.yaml")
    with pytest.raises(ConfigError, match="recipe.yaml: unknown key 'kl_coeff'; did you mean "
                                          "'kl_coef'?"):
        check_keys(["kl_coeff"], ["kl_coef", "gamma"], "recipe.yaml")
    with pytest.raises(ConfigError, match="known keys: gamma, kl_coef"):
        check_keys(["zzzz"], ["kl_coef", "gamma"], "recipe.yaml")
