"""Command-line options from the fields of a config dataclass: `--kl_coef 0.1`.

Names, defaults and help come from the dataclass and from the sentence under each field. Values are
read by the rules of `fastrl.yaml_file` and checked by `fastrl.parsing`, so that a setting means the
same on the command line as in a file. `--config FILE` gives settings that options override.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fastrl.errors import ConfigError
from fastrl.parsing import parse_config
from fastrl.yaml_file import load_yaml, nearest, parse_yaml

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One setting of a config class; those of nested configs have dotted names."""

    name: str
    hint: Any
    default: Any
    """dataclasses.MISSING where a value must be given."""
    sentence: str
    aliases: tuple[str, ...] = ()
    """Other names on the command line, from the field's metadata."""


@cache
def field_sentences(cls: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, those of inherited fields included."""
    sentences: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = ast.literal_eval(below.value) if _is_string(below) else ""
                # A field that is given another default keeps the sentence of its base class.
                sentences[field.target.id] = (" ".join(text.split())
                                              or sentences.get(field.target.id, ""))
    return sentences


def _is_string(node: ast.stmt) -> typing.TypeGuard[ast.Expr]:
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str))


def options(cls: type) -> Iterator[Option]:
    """Yield every setting of a config class, nested configs flattened."""
    hints, sentences = typing.get_type_hints(cls), field_sentences(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(hint):
            for inner in options(typing.cast(type, hint)):
                given = (inner.default if default is dataclasses.MISSING
                         else getattr(default, inner.name))
                yield dataclasses.replace(inner, name=f"{field.name}.{inner.name}", default=given)
        else:
            yield Option(field.name, hint, default, sentences[field.name],
                         field.metadata.get("aliases", ()))


def add_options(parser: argparse.ArgumentParser, cls: type, *, needs_all: bool = True) -> None:
    """Add `--config`, `--quiet` and one option per setting, absent from the result unless given."""
    parser.usage = "%(prog)s [--config FILE] [--name value ...]"
    parser.add_argument("--config", metavar="FILE",
                        help="YAML file of settings; options given here win over it")
    parser.add_argument("--quiet", action="store_true", help="print warnings and results only")
    required = parser.add_argument_group("required" if needs_all else "may be left out")
    optional = parser.add_argument_group("settings")
    for option in options(cls):
        is_required = option.default is dataclasses.MISSING
        group = required if is_required else optional
        # What a person types for Python's None is YAML's null.
        sentence = re.sub(r"\bNone\b", "null", option.sentence).replace("%", "%%")
        if not is_required:
            sentence += f" [{_written(option.default)}]".replace("%", "%%")
        flags = [f"--{name}" for name in (option.name, *option.aliases)]
        group.add_argument(*flags, dest=option.name, default=argparse.SUPPRESS,
                           metavar=_metavar(option.hint), help=sentence, **_shape(option.hint))


UNREAD = "unread"
"""Stands for a setting without default where nothing reads it."""


def read_options(parser: argparse.ArgumentParser, cls: type[Config], argv: Sequence[str], *,
                 needs_all: bool = True) -> tuple[Config, bool]:
    """Return the config that `--config` and the options of a command line describe, and `--quiet`.

    Args:
        parser: An empty parser, which gets the options of `cls`.
        cls: The config dataclass.
        argv: Arguments after the command's name.
        needs_all: False puts `UNREAD` where a setting without default is not given.
    Raises:
        ConfigError: an unknown option or key (the nearest one is named), a missing setting, or a
            value of the wrong type or out of bounds.
    """
    add_options(parser, cls, needs_all=needs_all)
    given = vars(parse_all(parser, argv))
    path, quiet = given.pop("config"), given.pop("quiet")
    values = load_yaml(Path(path)) if path is not None else {}
    hints = {option.name: option.hint for option in options(cls)}
    if not needs_all:
        values = {option.name: (UNREAD,) if typing.get_origin(option.hint) is tuple else UNREAD
                  for option in options(cls) if option.default is dataclasses.MISSING} | values
    for name, text in given.items():
        _assign(values, name.split("."), read_value(hints[name], text, f"--{name}"))
    where = parser.prog if path is None else f"{parser.prog} --config {path}"
    return parse_config(cls, values, where), quiet


def parse_all(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Return the values of the options; ConfigError names the first word that is none."""
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ConfigError(_unknown_argument(parser, unknown[0]))
    return given


def _unknown_argument(parser: argparse.ArgumentParser, argument: str) -> str:
    """Return the message for an argument that a command does not have; names the nearest one."""
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return (f"{parser.prog}: unexpected {argument!r}; settings are given as --name value "
                f"(`{parser.prog} --help`)")
    known = [flag for action in parser._actions for flag in action.option_strings]
    plain = {flag.lstrip("-"): flag for flag in known}
    meant = nearest(name.lstrip("-").replace("-", "_"), plain)
    advice = f"did you mean {plain[meant]}?" if meant else f"`{parser.prog} --help` lists them"
    return f"{parser.prog}: unknown option {name}; {advice}"


def read_value(hint: Any, text: str | list[str], where: str) -> Any:
    """Return the plain value of an option's text: text stays text, the rest is read as YAML."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        if text in ("null", ["null"]):
            return None
        (hint,) = [argument for argument in arguments if argument is not types.NoneType]
        return read_value(hint, text, where)
    if isinstance(text, list):
        if len(text) == 1 and text[0].startswith("["):
            return parse_yaml(text[0], where)
        return [read_value(arguments[0], item, where) for item in text]
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return text
    return parse_yaml(text, where)


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a dotted name in nested mappings."""
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{part}: expected settings, one `name: value` per line, got "
                              f"{inner!r}")
        values = inner
    values[path[-1]] = value


def _inner(hint: Any) -> Any:
    """The hint without `| None`."""
    if isinstance(hint, types.UnionType):
        return next(h for h in typing.get_args(hint) if h is not types.NoneType)
    return hint


def _shape(hint: Any) -> dict[str, Any]:
    """How many words an option takes: any number for tuples, none or one for flags."""
    hint = _inner(hint)
    if typing.get_origin(hint) is tuple:
        return {"nargs": "*"}
    return {"nargs": "?", "const": "true"} if hint is bool else {}


def _metavar(hint: Any) -> str:
    hint = _inner(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return _metavar(typing.get_args(hint)[0])
    if typing.get_origin(hint) is dict:
        return "{KEY: VALUE}"
    return {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}[hint]


def _written(default: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    words = {None: "null", True: "true", False: "false"}
    return words[default] if default is None or isinstance(default, bool) else str(default)
