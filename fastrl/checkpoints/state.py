"""`State`: all that a checkpoint keeps of an object, as flat tensors and plain JSON values.

Every object with state has two methods:

    state() -> State                  its tensors by reference, no copies
    load_state(state: State) -> None  copies into its own tensors; `State.copy_to` does the checks
"""

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastrl.errors import CheckpointError

_FLOAT = "$float"
_MAX_NAMES = 4


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Tensors and values under flat dotted names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Any shape, device and dtype that the trainers have; by reference."""
    values: dict[str, Any] = field(default_factory=dict)
    """None, bool, int, float (not finite too), str, and lists and dicts of these."""

    def under(self, name: str) -> "State":
        """The same with `name.` before every name."""
        return State({f"{name}.{key}": tensor for key, tensor in self.tensors.items()},
                     {f"{name}.{key}": value for key, value in self.values.items()})

    def part(self, name: str) -> "State":
        """What `under(name)` was made of; empty where nothing has that name."""
        begin = f"{name}."
        return State({key.removeprefix(begin): tensor for key, tensor in self.tensors.items()
                      if key.startswith(begin)},
                     {key.removeprefix(begin): value for key, value in self.values.items()
                      if key.startswith(begin)})

    @staticmethod
    def join(*states: "State") -> "State":
        """All of them in one; no name may come twice."""
        tensors, values = dict[str, Tensor](), dict[str, Any]()
        for state in states:
            twice = (tensors.keys() & state.tensors.keys()) | (values.keys() & state.values.keys())
            assert not twice, f"State.join: expected disjoint names, got {sorted(twice)} twice"
            tensors |= state.tensors
            values |= state.values
        return State(tensors, values)

    def copied(self) -> "State":
        """The same in CPU memory of its own: what happens to the originals no longer reaches it."""
        # clone() makes a tensor from one memory copy; to() would give a CPU tensor back as it is.
        tensors = {name: (tensor.detach().clone(memory_format=torch.contiguous_format)
                          if tensor.device.type == "cpu" else tensor.detach().cpu().contiguous())
                   for name, tensor in self.tensors.items()}
        return State(tensors, decode_values(encode_values(self.values)))

    def copy_to(self, owner: str, tensors: Mapping[str, Tensor], values: Collection[str] = ()
                ) -> dict[str, Any]:
        """Copy every tensor into the one of its name, and return the values.

        Nothing is changed unless all of it fits.

        Args:
            owner: Whose state it is, for the message.
            tensors: The owner's tensors, those of its `state()`.
            values: Names of the values of its `state()`.
        Raises:
            CheckpointError: when names are missing or unknown, or a shape or dtype differs.
        """
        _check_names(f"{owner}: tensors", self.tensors, tensors)
        _check_names(f"{owner}: values", self.values, values)
        for name, own in tensors.items():
            given = self.tensors[name]
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                raise CheckpointError(
                    f"{owner}: expected {name} {own.dtype} {tuple(own.shape)}, got {given.dtype} "
                    f"{tuple(given.shape)}; continue with the model and settings that the "
                    "checkpoint was made with")
        with torch.no_grad():
            for name, own in tensors.items():
                own.copy_(self.tensors[name])
        return self.values


def _check_names(what: str, given: Collection[str], expected: Collection[str]) -> None:
    missing, unknown = sorted({*expected} - {*given}), sorted({*given} - {*expected})
    if missing or unknown:
        raise CheckpointError(
            f"{what}: expected {len(expected)}, got {len(given)}; missing: {_some(missing)}; "
            f"unknown: {_some(unknown)}; continue with the model and settings that the checkpoint "
            "was made with")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more if names else "none"


def encode_values(values: Mapping[str, Any]) -> str:
    """Values as JSON text; every float comes back with the same bits, NaN and infinity too."""
    return json.dumps(_plain(values), indent=0, allow_nan=False)


def decode_values(text: str | bytes) -> dict[str, Any]:
    """What `encode_values` wrote.

    Raises:
        ValueError: when the text is not JSON, or not what `encode_values` writes.
    """
    try:
        values = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except (RecursionError, TypeError, struct.error) as error:
        raise ValueError(f"expected values as a checkpoint writes them, got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected an object of values, got {type(values).__name__}")
    return values


def _plain(value: Any) -> Any:
    """JSON with a float that is not finite as its eight bytes."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return (float(value) if math.isfinite(value)
                else {_FLOAT: struct.pack(">d", value).hex()})
    if isinstance(value, list):
        return [_plain(item) for item in value]
    assert isinstance(value, Mapping), (
        f"State: expected None, bool, int, float, str, list or dict, got {type(value).__name__}")
    for key in value:
        assert isinstance(key, str) and key != _FLOAT, f"State: a key cannot be {key!r}"
    return {key: _plain(item) for key, item in value.items()}


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"expected each name once, got {[key for key, _ in pairs]}")
    if _FLOAT in found:
        return struct.unpack(">d", bytes.fromhex(found[_FLOAT]))[0]
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"expected a finite number, got {name}")
