"""Constraints of IFEval: what follows each, and what just does not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastrl.errors import BackendUnavailableError, DataError
from fastrl.verify import follows, ifeval_reward
from fastrl.verify.instructions import _CHECKS

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "at least"}, ["GO and RUN", "A NASA man"],
     ["GO and run", "Only Titles Here"]),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "less than"}, ["GO now", "go"], ["GO NOW"]),
    ("change_case:english_capital", {}, ["ALL OF IT, 5!"], ["NOT all"]),
    ("change_case:english_lowercase", {}, ["all of it, 5!"], ["Not all"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. Here it is"],
     ["Sure. Say it."]),
    ("combination:two_responses", {}, ["one\n******\ntwo", "one ****** two ******"],
     ["one", "one ****** one", "a ****** b ****** c", "****** two", "a ****** ****** b"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] at [street 5]"],
     ["[name] at []", "name"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\nP.S. bye", "p. s. bye"],
     ["x\nPS bye", "see p.s"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S bye"],
     ["x\nP.S. bye"]),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["maybe"]),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```'],
     ["{a: 1}", "text", "[" * 100_000]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\nx\nSECTION 2\ny"], ["SECTION 1\nx", "SECTION one SECTION two"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n- b"],
     ["* a", "* a\n* b\n- c", "**bold**\n**more**"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*one* and *two*", "**one** and *two*"], ["*one* and two", "** **  * *", "**only this**"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<< >>", "<A title>", "<<\n>>"]),
    ("keywords:existence", {"keywords": ["mom", "mother"]}, ["Mom is my MOTHER"], ["Mom only"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocket"], ["a Rock!"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"},
     ["War and war"], ["war"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
     ["one!"], ["one! two!"]),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "at least"},
     ["tT"], ["to"]),
    ("language:response_language", {"language": "de"},
     ["Heute ist ein schöner Tag, und wir gehen zusammen in den Wald."],
     ["Today is a beautiful day, and we go to the forest together."]),
    ("language:response_language", {"language": "hi"},
     ["आज का दिन बहुत अच्छा है और हम साथ में जंगल जाते हैं।"],
     ["Today is a beautiful day."]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, ["One.\n\n\"So, two.\""],
     ["One.\n\nTwo.", "So one.\nSo two.", "One.\n\nSo two.\n\nThree."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["one\n***\ntwo", "a ***b ***"],
     ["one", "a *** *** b", "a *** b *** c"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     ["One. Two!", "He asked: \"Why?\" Nobody knew."], ["Version 2.5 is out.", "One"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"},
     ["One.", "no end"], ["One. Two."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"},
     ["it's three words"], ["two words", "- - - -"]),
    ("punctuation:no_comma", {}, ["none; here"], ["one, here"]),
    ("startend:end_checker", {"end_phrase": "Any questions?"},
     ["Bye. any questions?", '"Any questions?"'],
     ["Any questions? Bye."]),
    ("startend:quotation", {}, ['"all of it"'], ['"', 'not "all"', "'all'"]),
]


@pytest.mark.parametrize("name, arguments, good, bad", CASES,
                         ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_what_follows_and_what_does_not(
    name: str, arguments: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    if name.startswith("language"):
        pytest.importorskip("py3langid", reason="the extra ifeval is not installed")
    assert [text for text in good if not follows(text, name, arguments)] == []
    assert [text for text in bad if follows(text, name, arguments)] == []
    assert not follows("  \n", name, arguments)


def test_every_constraint_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(_CHECKS)


def test_reward_is_the_share_of_constraints() -> None:
    names = ["punctuation:no_comma", "keywords:existence"]
    kwargs: list[dict[str, Any]] = [{}, {"keywords": ["cat"]}]
    assert ifeval_reward([""] * 3, ["a cat", "a, cat", ""], instruction_id_list=[names] * 3,
                         kwargs=[kwargs] * 3) == [1.0, 0.5, 0.0]


def test_bad_constraints_are_named() -> None:
    with pytest.raises(DataError, match="expected one of .*, got 'no:such'"):
        follows("x", "no:such", {})
    with pytest.raises(DataError, match=r"number_words: arguments \['words'\] do not fit"):
        follows("x", "length_constraints:number_words", {"words": 5})
    with pytest.raises(DataError, match="'at least' or 'less than', got 'about'"):
        follows("x", "length_constraints:number_words", {"num_words": 5, "relation": "about"})


def test_a_language_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'fastrl-engine\[ifeval\]'"):
        follows("x", "language:response_language", {"language": "de"})


def test_every_row_of_ifeval_can_be_checked(shared: Path) -> None:
    pytest.importorskip("py3langid", reason="the extra ifeval is not installed")
    rows = [json.loads(line) for line in
            (shared / "data/eval/ifeval.jsonl").read_text("utf-8").splitlines()]
    scores = ifeval_reward([""] * len(rows), [row["prompt"] for row in rows],
                           instruction_id_list=[row["instruction_id_list"] for row in rows],
                           kwargs=[row["kwargs"] for row in rows])
    assert len(scores) == 541 and 0.1 < sum(scores) / 541 < 0.9
