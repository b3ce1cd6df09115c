"""State: names, copies, and values that come back with the same bits."""

import math
import random
import struct

import pytest
import torch

from fastrl.checkpoints import State
from fastrl.checkpoints.state import decode_values, encode_values
from fastrl.errors import CheckpointError


def test_part_is_what_under_was() -> None:
    state = State({"a.b": torch.ones(1)}, {"a": 1})
    joined = State.join(state.under("x"), state.under("xy"), State(values={"x": 5}))
    assert list(joined.tensors) == ["x.a.b", "xy.a.b"] and set(joined.values) == {"x.a", "xy.a",
                                                                                 "x"}
    assert joined.part("x").values == {"a": 1}
    assert joined.part("x").tensors["a.b"] is state.tensors["a.b"]
    assert joined.part("z").tensors == {}


@pytest.mark.parametrize("other", [State({"a": torch.ones(1)}), State(values={"b": 2})])
def test_a_name_comes_once(other: State) -> None:
    with pytest.raises(AssertionError, match="twice"):
        State.join(State({"a": torch.ones(1)}, {"b": 1}), other)


def test_values_keep_every_bit() -> None:
    generator = random.Random(3)
    floats = [struct.unpack(">d", generator.randbytes(8))[0] for _ in range(2000)]
    floats += [math.nan, -math.nan, math.inf, -math.inf, -0.0, 5e-324]
    values = {"f": floats, "n": {"none": None, "yes": True, "int": 2**130, "text": "nan\u00e9\n",
                                 "empty": [{}, []]}}
    back = decode_values(encode_values(values))
    assert [struct.pack(">d", x) for x in back["f"]] == [struct.pack(">d", x) for x in floats]
    assert back["n"] == values["n"] and back["n"]["yes"] is True


@pytest.mark.parametrize("value", [(1, 2), torch.ones(1), {1: 2}, {"$float": "x"}, b"x"])
def test_values_are_json(value: object) -> None:
    with pytest.raises(AssertionError, match="State"):
        encode_values({"a": value})


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[1]", '{"a": NaN}', '{"$float": "00"}', "{",
                                  '{"$float": 3}', "[" * 100_000])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        decode_values(text)


def test_copies_are_apart_from_the_originals() -> None:
    tensor, inner = torch.arange(6.0).view(2, 3).t(), [1]
    state = State({"a": tensor}, {"b": inner})
    copy = state.copied()
    tensor.zero_()
    inner.append(2)
    assert copy.tensors["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and copy.values["b"] == [1]


def test_copy_to_fills_the_owners_tensors() -> None:
    own = {"a": torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)}
    given = State({"a": torch.ones(2, dtype=torch.bfloat16)}, {"step": 3})
    assert given.copy_to("x", own, ["step"]) == {"step": 3}
    assert own["a"].tolist() == [1, 1]


@pytest.mark.parametrize(("state", "said"), [
    (State({"a": torch.ones(2)}), r"owner: tensors: .*missing: b; unknown: none"),
    (State({"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}), "unknown: c"),
    (State({"a": torch.ones(2), "b": torch.ones(3)}), r"expected b torch.float32 \(1,\).* \(3,\)"),
    (State({"a": torch.ones(2), "b": torch.ones(1).double()}), "got torch.float64"),
    (State({"a": torch.ones(2), "b": torch.ones(1)}, {"v": 1}), "values: .*unknown: v"),
])
def test_what_does_not_fit_is_named_and_changes_nothing(state: State, said: str) -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=said):
        state.copy_to("owner", own)
    assert own["a"].tolist() == [0, 0]
