"""No launcher of a Triton kernel reads a tensor on the host; run by test_triton.py.

Tensors on the meta device have shapes and no values: what asks for one fails.
"""

import importlib
import runpy
from pathlib import Path
from typing import Any

import pytest
from fastrl_kernels.triton.support import is_interpreted
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastrl import backends, ops

CALLS = runpy.run_path(str(Path(__file__).parents[1] / "ops/test_contract.py"))["CALLS"]
NAMES = [name for name in CALLS
         if "triton" in importlib.import_module(getattr(ops, name).__module__).PREFERENCE]
pytestmark = pytest.mark.skipif(not is_interpreted(), reason="replaces the interpreter's launch")


def on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to("meta").requires_grad_(value.is_floating_point())


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_without_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_refusal", lambda *args: None)  # it refuses the meta device
    launched: list[str] = []
    monkeypatch.setattr(InterpretedFunction, "run",
                        lambda kernel, *args, **options: launched.append(kernel.__name__))
    arguments, options = CALLS[name]()
    options = {key: on_meta(value) for key, value in options.items()}
    returned = getattr(ops, name)(*map(on_meta, arguments), **options, backend="triton")
    results = returned if isinstance(returned, tuple) else (returned,)
    loss = sum(x.sum() for x in results if isinstance(x, Tensor) and x.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    assert launched
