"""YAML files in: plain values only, every key once, every mistake named with file and line.

Differs from PyYAML's SafeLoader: a key given twice is an error (there the last one wins), numbers
follow YAML 1.2 (`1e-5` is a number, `010` and `1:30` are not), dates stay text, and aliases and
merge keys are refused.
"""

import difflib
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from fastrl.errors import ConfigError

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
_REPLACED_TAGS = ("int", "float", "timestamp", "merge", "value")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the differences named at the top of this file."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read; write the value out",
                                       problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False
                          ) -> dict[Hashable, Any]:
        first_lines: dict[str, int] = {}
        for key_node, _ in node.value:
            mark = key_node.start_mark
            if key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key must be plain text; quote it",
                                           problem_mark=mark)
            key = key_node.value
            if key in first_lines:
                problem = (f"key {key!r} is given twice (first in line {first_lines[key]}); "
                           "remove one of them")
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            first_lines[key] = mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers
            if tag.removeprefix("tag:yaml.org,2002:") not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: One YAML document.
        name: What error messages call it, such as a file name.
    Raises:
        ConfigError: not valid YAML, a key given twice, a tag such as `!!python/name`, or an alias.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{name}: expected settings of a few levels, got a text that nests "
                          "deeper than can be read; write plain values") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        problem = error.problem or error.context or "not valid YAML"
        if "could not determine a constructor" in problem:
            problem = "tags (!...) are not read; write a plain value"
        elif "'@'" in problem:
            problem += "; put it in quotes, as in \"@sft\""
        raise ConfigError(f"{where}: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    except ValueError as error:  # a number that Python does not convert
        raise ConfigError(f"{name}: expected numbers of at most 4,300 digits, got: {error}; "
                          "correct the number") from None


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping of plain values (see parse_yaml).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this file ({error.strerror}); "
                          "check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} "
                          f"at offset {error.start}; save the file as UTF-8") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, got a "
                          f"{type(values).__name__}; write one setting per line")
    return values


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for the first key that is not known, naming the nearest one that is."""
    known = list(known)
    for key in keys:
        if key not in known:
            raise ConfigError(unknown_key(key, known, where))


def unknown_key(key: str, known: Iterable[str], where: str) -> str:
    """Return the message for a key that nobody knows: the nearest known key, or all of them."""
    known = sorted(known)
    name = nearest(key, known)
    advice = f"did you mean {name!r}?" if name else f"known keys: {', '.join(known)}"
    return f"{where}: unknown key {key!r}; {advice}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a person most likely meant: the same within other settings, one
    that it begins, or one spelt alike."""
    known, last = list(known), name.rpartition(".")[2]
    meant = ([other for other in known if other.rpartition(".")[2] == last]
             or [other for other in known if other.startswith(name)]
             or difflib.get_close_matches(name, known, n=1, cutoff=0.5))
    return meant[0] if meant else None
