"""Constraints on the form of a response, as in IFEval: each can be checked by a program.

Where the benchmark counts sentences and words with a trained tokenizer, this counts with the plain
rules below; and all-capital or all-lowercase text is not also tested for being English.

Source: Zhou et al. 2023 (arXiv 2311.07911), table 1, for the list of constraints.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl.errors import BackendUnavailableError, DataError

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SENTENCE_END = re.compile(r"[.!?。！？।۔]+[\"'”’)\]]*(?=\s|$)")
_POSTSCRIPTS = {"P.S.": r"^\s*p\.\s?s\.", "P.P.S": r"^\s*p\.\s?p\.\s?s"}
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def ifeval_reward(
    prompts: Sequence[str], completions: Sequence[str], *,
    instruction_id_list: Sequence[Sequence[str]], kwargs: Sequence[Sequence[Mapping[str, Any]]],
) -> list[float]:
    """Share of the constraints of its prompt that each completion follows.

    Args:
        prompts: Not read.
        completions: B texts; an empty one follows nothing.
        instruction_id_list: Names of the constraints of each row, as in IFEval's file.
        kwargs: Their arguments, in the same order.
    Returns:
        B shares from 0 to 1.
    Raises:
        DataError: when a constraint is unknown or lacks an argument.
        BackendUnavailableError: when a language is asked for and py3langid is not installed.
    """
    return [sum(follows(text, name, arguments) for name, arguments
                in zip(names, settings, strict=True)) / max(1, len(names))
            for text, names, settings in zip(completions, instruction_id_list, kwargs, strict=True)]


def follows(text: str, name: str, arguments: Mapping[str, Any]) -> bool:
    """True when a response follows one constraint.

    Args:
        text: The response; white space alone follows nothing.
        name: As in IFEval, such as `punctuation:no_comma`.
        arguments: Of the constraint.
    Raises:
        DataError, BackendUnavailableError: as `ifeval_reward`.
    """
    if name not in _CHECKS:
        raise DataError(f"instruction: expected one of {', '.join(sorted(_CHECKS))}, got {name!r}")
    try:
        return bool(text.strip()) and _CHECKS[name](text, **arguments)
    except TypeError as error:
        raise DataError(f"instruction {name}: arguments {sorted(arguments)} do not fit: "
                        f"{error}; compare with a row of IFEval") from error


def _holds(count: int, relation: str, bound: int) -> bool:
    if relation not in ("at least", "less than"):
        raise DataError(f"relation: expected 'at least' or 'less than', got {relation!r}")
    return count >= bound if relation == "at least" else count < bound


def _contains_all(text: str, keywords: Sequence[str]) -> bool:
    lowered = text.lower()
    return all(word.lower() in lowered for word in keywords)


def _contains_often(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(text.lower().count(keyword.lower()), relation, frequency)


def _contains_none(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
                   for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


def _language(text: str, language: str) -> bool:
    try:
        import py3langid
    except ImportError as error:
        raise BackendUnavailableError(
            "language:response_language: expected the package py3langid, which is not installed; "
            "pip install 'fastrl-engine[ifeval]'") from error
    found: str = py3langid.classify(text)[0]
    return found == language


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    parts = [part for part in _SENTENCE_END.split(text) if _WORD.search(part)]
    return _holds(len(parts), relation, num_sentences)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(_WORD.findall(text)), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in text.strip().split("***")]
    inner = parts[not parts[0]:len(parts) - (not parts[-1])]
    return all(inner) and len(inner) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]
    if len(parts) != num_paragraphs or not 0 < nth_paragraph <= len(parts):
        return False
    first = _WORD.search(parts[nth_paragraph - 1])
    return first is not None and first[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    pattern = _POSTSCRIPTS.get(postscript_marker, rf"^\s*{re.escape(postscript_marker)}")
    return re.search(pattern, text, re.IGNORECASE | re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets


def _answer(text: str) -> bool:
    return any(answer in text for answer in _ANSWERS)


def _highlights(text: str, num_highlights: int) -> bool:
    bold = re.findall(r"\*\*\s*[^\s*][^*\n]*\*\*", text)
    single = re.findall(r"\*\s*[^\s*][^*\n]*\*", re.sub(r"\*\*[^*\n]*\*\*", "", text))
    return len(bold) + len(single) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+?>>", text))


def _two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    inner = parts[not parts[0]:len(parts) - (not parts[-1])]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').strip().lower().endswith(end_phrase.strip().lower())


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(sum(word.isupper() for word in _WORD.findall(text)), capital_relation,
                  capital_frequency)


def _quoted(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


_CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "combination:repeat_prompt": _repeats,
    "combination:two_responses": _two,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _answer,
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _contains_all,
    "keywords:forbidden_words": _contains_none,
    "keywords:frequency": _contains_often,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _words,
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
}
