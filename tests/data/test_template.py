"""Chat templates: slots, trimming, and what a hostile template cannot do."""

import pytest

from fastrl.data.template import ChatTemplate, Slot, find_slot, split_slots
from fastrl.errors import DataError, ModelError


def parts(source: str, *roles: str, prompt: bool = True) -> list[str | Slot]:
    template = ChatTemplate(source, {"bos_token": "<s>"}, "test")
    return split_slots(template.render(roles, add_generation_prompt=prompt))


def test_content_is_a_slot() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}!"
    assert parts(source, "user", "assistant") == [
        "<s>[user]", Slot(0, False, False), "[assistant]", Slot(1, False, False), "!"]


@pytest.mark.parametrize(("expression", "expected"), [
    ("messages[0].content | trim", (True, True)),
    ("messages[0].content.strip()", (True, True)),
    ("messages[0].content.rstrip()", (False, True)),
    ("messages[0].content.lstrip()", (True, False)),
    ("messages[0].content", (False, False)),
    ("messages[0]['content'] | upper", (False, False)),
])
def test_trimming_is_seen(expression: str, expected: tuple[bool, bool]) -> None:
    [before, slot, after] = parts(f"{{{{ '\\n' + ({expression}) + '\\n' }}}}", "user")
    assert (before, slot, after) == ("\n", Slot(0, *expected), "\n")


@pytest.mark.parametrize(("slot", "expected"), [
    (Slot(0, True, True), "x y"), (Slot(0, True, False), "x y \n"), (Slot(0, False, True), " x y"),
    (Slot(0, False, False), " x y \n")])
def test_slots_trim_their_content(slot: Slot, expected: str) -> None:
    assert slot.fill(" x y \n") == expected


def test_dropped_and_repeated_content() -> None:
    assert parts("{{ messages[1].content * 1 }}", "system", "user") == [Slot(1, False, False)]
    twice = parts("{{ messages[0].content }}|{{ messages[0].content | trim }}", "user")
    assert twice == [Slot(0, False, False), "|", Slot(0, True, True)]


def test_conditions_on_content_are_not_triggered() -> None:
    source = "{% if '</think>' in messages[0].content %}x{% endif %}{{ messages[0].content }}"
    assert parts(source, "user") == [Slot(0, False, False)]


def test_find_slot() -> None:
    rendered = ChatTemplate("a{{ messages[0].content }}b{{ messages[0].content | trim }}", {}, "t"
                            ).render(("user",), add_generation_prompt=False)
    assert find_slot(rendered, 0) == (1, 4)
    assert find_slot(rendered, 0, 4) == (5, 6)
    assert find_slot(rendered, 1) is None


def test_generation_prompt_and_helpers() -> None:
    assert parts("{% if add_generation_prompt %}go{% endif %}", "user") == ["go"]
    assert parts("{% if add_generation_prompt %}go{% endif %}", "user", prompt=False) == []
    assert parts("{{ {'é': [1, 2]} | tojson }}", "user") == ['{"é": [1, 2]}']
    assert parts("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
                 "user") == ["01"]
    assert parts("{{ strftime_now('%Y') }}", "user")[0].isdigit()  # type: ignore[union-attr]
    assert parts("{% set ns = namespace(n=1) %}{{ ns.n * 3 }}", "user") == ["3"]
    assert parts("{% generation %}x{% endgeneration %}", "user") == ["x"]


@pytest.mark.parametrize(("source", "expected"), [
    ("{{ raise_exception('only user') }}", "only user"),
    ("{{ none_such + 'x' }}", "'none_such' is undefined"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ 'a' * 10000000000 }}", "a product that is too large"),
    ("{{ [1] * 10000000000 }}", "a product that is too large"),
    ("{{ 10 ** 10 ** 10 }}", "a power"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "computes for more than 1 s"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
     "computes for more than 1 s"),
    ("{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
     "too large"),
    ("{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
     "writes more than"),
    ("{% set x %}{% for i in range(999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
     "writes more than"),
    ("{{ 'x' | center(10000000000) }}", "too large"),
    ("{{ 'x'.ljust(10000000000) }}", "too large"),
    ("{{ '{:>10000000000}'.format(1) }}", "a width that is too large"),
    ("{{ '{:>{w}}'.format(1, w=10000000000) }}", "too large"),
    ("{{ '%10000000000d' % 1 }}", "a width that is too large"),
    ("{{ '%10000000000d' | format(1) }}", "a width that is too large"),
    ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}", "too large"),
    ("{{ (['a' * 9999] * 999) | join('b' * 9999) }}", "too large"),
    ("{{ range(99999) | map('string') | join('b' * 9999) }}", "too large"),
    ("{{ {'a': [1]} | tojson(indent=1000000000) }}", "too large"),
    ("{{ lipsum(n=100) }}", "'lipsum' is undefined"),
    ("{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
     "writes more than 1,048,576 characters"),
    ("{% for i in range(10000000000) %}{% endfor %}", "Range too big"),
    ("{{ '\U00100005' }}", "private-use characters"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages[7].content }}", "has no element 7"),
])
def test_templates_that_fail_name_the_reason(source: str, expected: str) -> None:
    with pytest.raises(DataError, match="template of test refuses .* roles user") as caught:
        parts(source, "user")
    assert expected in str(caught.value)


@pytest.mark.parametrize("source", ["{% for %}", "{{ " + "(" * 5000, "a" * (2**20 + 1),
                                    "{{ " + "[" * 300 + "]" * 300 + " }}"])
def test_sources_that_do_not_compile(source: str) -> None:
    with pytest.raises(ModelError, match="expected a Jinja chat template"):
        ChatTemplate(source, {}, "test")


def test_joined_texts_and_sums_are_as_in_jinja() -> None:
    assert parts("{{ 'a' ~ 1 ~ ('b' ~ none) }}{{ 5 % 3 + 2000000 * 0 + 3000000 }}", "user") == [
        "a1bNone3000002"]
    assert parts("{{ '%s=%d' % ('a', 3) }}{{ 'a,b'.split(',') | map('upper') | join('-') }}",
                 "user") == ["a=3A-B"]


def test_source_that_is_not_a_template() -> None:
    with pytest.raises(ModelError, match="expected a Jinja chat template"):
        ChatTemplate("{% for %}", {}, "test")


def test_too_many_messages() -> None:
    with pytest.raises(DataError, match="expected at most 65533 messages, got 65534"):
        parts("", *["user"] * 65534)
