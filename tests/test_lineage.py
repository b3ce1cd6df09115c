"""Hashes of inputs, and what changed since."""

import pytest

from fastrl.errors import DataError
from fastrl.lineage import FORMAT_VERSION, hash_path, lineage_changes, make_lineage

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180 example


def test_hash_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert hash_path(tmp_path / "a.txt") == ABC


def test_hash_of_a_folder_sees_names_contents_and_sub_folders(tmp_path):
    def folder(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return hash_path(tmp_path / name)

    base = folder("base", {"a": "1", "sub/b": "2"})
    assert folder("same", {"sub/b": "2", "a": "1"}) == base
    assert folder("content", {"a": "1", "sub/b": "3"}) != base
    assert folder("name", {"a": "1", "sub/c": "2"}) != base
    assert folder("place", {"a": "1", "b": "2"}) != base


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing.jsonl: expected a file or folder"):
        hash_path(tmp_path / "nothing.jsonl")


def test_lineage_holds_settings_and_hashes_without_the_output_folder(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    lineage = make_lineage("sft", {"seed": 1, "output_dir": "x"}, {"a.txt": tmp_path / "a.txt"})
    assert lineage == {"kind": "sft", "format_version": FORMAT_VERSION, "config": {"seed": 1},
                       "inputs": {"a.txt": ABC}}


def test_changes_are_listed_one_by_one():
    before = {"kind": "ppo", "config": {"seed": 1, "sampling": {"top_k": 0}, "old": 2},
              "inputs": {"@sft": ABC}}
    now = {"kind": "ppo", "config": {"seed": 2, "sampling": {"top_k": 5}},
           "inputs": {"@sft": "0" * 64, "p.jsonl": "1" * 64}}
    assert lineage_changes(before, before) == []
    assert lineage_changes(before, now) == [
        "seed: 1 -> 2", "sampling.top_k: 0 -> 5", "old: 2 -> absent",
        "inputs @sft: ba7816bf8f01 -> 000000000000",
        "inputs p.jsonl: absent -> 111111111111",
    ]
