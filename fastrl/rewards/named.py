"""Reward functions by name: those of `fastrl.verify`, and `file.py:name`.

A file is executed by `find_function` only, that is when the user has named it.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastrl.errors import ConfigError, RewardError
from fastrl.reward_settings import split_function
from fastrl.verify import format_reward, gsm8k_reward, ifeval_reward, length_reward
from fastrl.yaml_file import nearest, unknown_key

RewardFunction = Callable[..., Sequence[float]]

_MAKERS: dict[str, Callable[..., RewardFunction]] = {"length": length_reward,
                                                     "format": format_reward}
"""Make a function from arguments."""
_PLAIN: dict[str, RewardFunction] = {"gsm8k": gsm8k_reward, "ifeval": ifeval_reward}
BUILT_IN = (*_PLAIN, *_MAKERS)
"""Names of reward functions that need no file."""
_NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


def find_function(
    name: str, arguments: Mapping[str, Any] = _NO_ARGUMENTS
) -> RewardFunction:
    """The reward function of a name.

    Args:
        name: One of `BUILT_IN`, or `path/to/file.py:function`; the file is executed.
        arguments: Of `length` and `format`, such as target and pattern.
    Raises:
        ConfigError: the name or an argument is wrong, or the file is not Python.
        RewardError: the file raises while it is executed.
    """
    check_function(name, arguments)
    path, function = split_function(name)
    if path is not None:
        return _from_file(path, function)
    return _MAKERS[name](**arguments) if name in _MAKERS else _PLAIN[name]


def check_function(name: str, arguments: Mapping[str, Any] = _NO_ARGUMENTS) -> None:
    """Raise ConfigError where `find_function` would, as far as can be told without executing it."""
    path, function = split_function(name)
    if path is not None:
        _check_arguments(name, None, arguments)
        _check_defined(path, function)
    elif name not in BUILT_IN:
        raise ConfigError(unknown_key(name, BUILT_IN, "reward_function")
                          + "; a function of your own is given as path/to/file.py:name")
    else:
        _check_arguments(name, _MAKERS.get(name), arguments)


def _check_arguments(name: str, maker: Callable[..., RewardFunction] | None,
                     arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a maker does not have or lacks, and any for plain functions."""
    if maker is None:
        if arguments:
            raise ConfigError(f"reward function {name}: expected no arguments, got "
                              f"{sorted(arguments)}; only {' and '.join(_MAKERS)} take some")
        return
    try:
        inspect.signature(maker).bind(**arguments)
        maker(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"reward function {name}: expected arguments {inspect.signature(maker)}, got "
            f"{dict(arguments)}: {error}; correct arguments") from error


def _check_defined(path: str, function: str) -> None:
    """Raise ConfigError unless a file is there, is Python and defines the name at its top level."""
    if not Path(path).is_file():
        raise ConfigError(f"reward_function: expected a Python file, found none at {path}; correct "
                          "the path")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"reward_function: expected Python in {path}, got {error}; correct the "
                          "file") from error
    # Walks into `if` and `try`, and so into functions too: a name found there only is found out
    # when the file is executed.
    names = {node.name for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree)
              if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {(alias.asname or alias.name) for node in ast.walk(tree)
              if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names}
    if function not in names and "*" not in names:
        raise ConfigError(_undefined(path, function, names))


def _undefined(path: str, function: str, names: "set[str]") -> str:
    meant = nearest(function, names)
    return (f"reward_function: expected {path} to define {function!r}, it does not; "
            + (f"did you mean {meant!r}?" if meant else "correct the name after the colon"))


def _from_file(path: str, function: str) -> RewardFunction:
    """Execute a file and return what it calls `function`; the file may import its neighbours."""
    spec = spec_from_file_location(f"reward_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # any path that ends in .py has a loader
    module = module_from_spec(spec)
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit in a file would end the run in silence
        raise RewardError(f"reward function {function}: expected a file that can be imported, got "
                          f"{type(error).__name__}: {error}, while {path} was executed; correct it"
                          ) from error
    if not hasattr(module, function):
        raise ConfigError(_undefined(path, function, set(vars(module))))
    found: RewardFunction = getattr(module, function)
    return found
