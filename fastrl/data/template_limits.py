"""What a chat template may compute: the sandbox of Jinja, with a bound on time and on sizes.

The sandbox keeps a template away from Python's insides. It does not keep it from computing without
end or filling the memory: `{% for %}` in `{% for %}`, a macro that calls itself twice, a text
doubled in a loop, `{{ 'x' | center(10000000000) }}`. So loops and macros look at the clock, and
every operator, filter and call that can make a text or list larger is asked for its sizes first.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARACTERS = 2**20
"""Longest text that a template may write around the contents of a conversation, longest value that
it may compute, and longest source."""
MAX_SECONDS = 1.0
"""Processor time of one rendering; a template that is in use takes milliseconds."""
_CLOCK, _JOIN = "fastrl_clock", "fastrl_join"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, with limits. One rendering at a time."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        """Take Jinja's options."""
        super().__init__(**options)
        self.deadline = 0.0
        self.globals.pop("lipsum")  # writes as much as it is asked for
        self.filters = {name: self.bounded(function) for name, function in self.filters.items()}
        self.filters |= {_CLOCK: self._look_at_clock, _JOIN: self._join_all}
        self.concat = _join  # type: ignore[method-assign]

    def start(self) -> None:
        """Begin a rendering: its time counts from now."""
        self.deadline = time.process_time() + MAX_SECONDS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse; every loop and macro begins with a look at the clock, and `~` is `_JOIN`."""
        tree = super()._parse(source, name, filename)
        loops: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
        for node in loops:
            look = nodes.Filter(nodes.Const(""), _CLOCK, [], [], None, None)
            node.body.insert(0, nodes.Output([look]))
        _replace_concat(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` when its result has a sensible size."""
        self._look_at_clock("")
        sizes = _size(left), _size(right)
        if operator == "+":
            too_large = sum(sizes) > MAX_TEMPLATE_CHARACTERS and not _is_number(left)
        else:
            too_large = sizes[0] * sizes[1] > MAX_TEMPLATE_CHARACTERS and (
                operator != "%" or not _is_number(left))
        if operator == "**" or too_large:
            raise TemplateError("it computes a power or a product that is too large")
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what the template calls, when its arguments have sensible sizes."""
        self._look_at_clock("")
        owner = getattr(obj, "__self__", None)
        if not isinstance(obj, type) and isinstance(owner, (str, list, tuple, dict)):
            args, kwargs = _check_sizes((owner, *args), kwargs)
            args = args[1:]
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`text.format` in the sandbox, when text and arguments have sensible sizes."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            args, kwargs = _check_sizes((value.__self__, *args), kwargs)
            return str(inner(*args[1:], **kwargs))

        return bounded

    def bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, when its value and arguments have sensible sizes."""
        @functools.wraps(function)  # keeps the mark that it takes the environment first
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._look_at_clock("")
            return function(*_check_sizes(args, kwargs)[0], **kwargs)

        return bounded

    def _look_at_clock(self, value: str) -> str:
        if time.process_time() > self.deadline:
            raise TemplateError(f"it computes for more than {MAX_SECONDS:g} s")
        return value

    def _join_all(self, values: list[Any]) -> str:
        self._look_at_clock("")
        return _join(map(str, values))


def _join(pieces: Iterable[str]) -> str:
    """The pieces end to end."""
    found, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_TEMPLATE_CHARACTERS:
            raise TemplateError(f"it writes more than {MAX_TEMPLATE_CHARACTERS:,} characters")
        found.append(piece)
    return "".join(found)


def _replace_concat(node: nodes.Node) -> None:
    """Put `_JOIN` of a list where the tree says `a ~ b`."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_joined(item) for item in value])
        else:
            setattr(node, name, _joined(value))
    for child in node.iter_child_nodes():
        _replace_concat(child)


def _joined(value: Any) -> Any:
    if isinstance(value, nodes.Concat):
        return nodes.Filter(nodes.List(value.nodes, lineno=value.lineno), _JOIN, [], [], None, None,
                            lineno=value.lineno)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _size(value: object, depth: int = 8) -> int:
    """How large a value is, or how large it can make another: characters, items, or a number."""
    if isinstance(value, (int, float)):
        return int(min(abs(value), 2.0**60)) if value == value else 0
    if isinstance(value, (str, bytes, range)):
        return len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, (list, tuple, set)) or depth == 0:
        return 0
    total = len(value)
    for item in value:
        total += _size(item, depth - 1) if not _is_number(item) else 1
        if total > MAX_TEMPLATE_CHARACTERS:
            break
    return total


def _check_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]
                 ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with lazy ones listed; TemplateError when they could make too large a text."""
    args = tuple(_listed(arg) for arg in args)
    product = 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, str):
            _check_widths(value)
        product *= 1 + _size(value)
    if product > 16 * MAX_TEMPLATE_CHARACTERS:
        raise TemplateError("it computes with values that are too large")
    return args, kwargs


def _listed(value: Any) -> Any:
    if not isinstance(value, Iterator):
        return value
    items = list(itertools.islice(value, MAX_TEMPLATE_CHARACTERS + 1))
    if len(items) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateError("it computes with values that are too large")
    return items


def _check_widths(text: str) -> None:
    """Refuse a format that asks for a width of many digits: "%1000000000d", "{:>1000000000}"."""
    digits = 0
    if "%" in text or "{" in text:
        for character in text:
            digits = digits + 1 if character.isdigit() else 0
            if digits > 6:
                raise TemplateError("it formats with a width that is too large")
