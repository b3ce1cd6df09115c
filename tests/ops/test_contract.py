"""What holds for every op: refusals, doctests, dtypes, non-contiguous inputs, torch.compile."""

import doctest
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import ops
from fastrl.backends import use_backend
from fastrl.errors import BackendUnavailableError

B, T, N, M, D, V = 3, 5, 6, 7, 4, 11
FILES = sorted({function.__module__ for name in ops.__all__
                if not isinstance(function := getattr(ops, name), type)})


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape)


def mask(*shape: int) -> Tensor:
    return torch.rand(*shape) > 0.3


def tokens() -> Tensor:
    return torch.randint(V, (M,))


CALLS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "masked_sum": lambda: ((floats(B, T), mask(B, T)), {}),
    "masked_mean": lambda: ((floats(B, T), mask(B, T)), {}),
    "whiten": lambda: ((floats(B, T), mask(B, T)), {}),
    "kl_estimate": lambda: ((floats(B, T), floats(B, T), mask(B, T)), {}),
    "shape_rewards": lambda: (
        (floats(B), floats(B, T), floats(B, T), mask(B, T)), {"kl_coef": 0.1}),
    "compute_gae": lambda: ((floats(B, T), floats(B, T), mask(B, T)), {}),
    "gather_logprobs": lambda: ((floats(M, V), tokens()), {}),
    "linear": lambda: ((floats(N, D), floats(V, D), floats(V)), {}),
    "linear_logprobs": lambda: ((floats(M, D), floats(V, D), tokens()), {"bias": floats(V)}),
    "linear_kl": lambda: (
        (floats(M, D), floats(V, D), floats(M, D + 1), floats(V, D + 1)),
        {"bias": floats(V), "ref_bias": floats(V)}),
    "linear_cross_entropy": lambda: (
        (floats(M, D), floats(V, D), tokens(), mask(M)),
        {"denominator": 5.0, "bias": floats(V), "token_weights": floats(M)}),
    "linear_policy_loss": lambda: (
        (floats(M, D), floats(V, D), tokens(), floats(M) - 2, floats(M), mask(M)),
        {"denominator": 5.0, "bias": floats(V), "entropy_coef": 0.1}),
    "policy_loss": lambda: ((floats(M), floats(M), floats(M), mask(M)), {}),
    "value_loss": lambda: ((floats(M), floats(M), floats(M), mask(M)), {}),
    "ppo_loss": lambda: (
        (floats(M), floats(M), floats(M), floats(M), floats(M), floats(M), mask(M)), {}),
    "ranking_loss": lambda: (
        (floats(7), torch.tensor([0, 1, 1, 2, 1, 0, 0]), torch.tensor([0, 4, 7])), {}),
    "rms_norm": lambda: ((floats(N, D), floats(D)), {"epsilon": 0.1}),
    "add_rms_norm": lambda: ((floats(N, D), floats(N, D), floats(D)), {"epsilon": 0.1}),
    "layer_norm": lambda: ((floats(N, D), floats(D), floats(D)), {"epsilon": 0.1}),
    "add_layer_norm": lambda: (
        (floats(N, D), floats(N, D), floats(D), floats(D)), {"epsilon": 0.1}),
    "swiglu": lambda: ((floats(N, 2 * D),), {}),
    "gelu": lambda: ((floats(N, D),), {"approximate": "tanh"}),
    "packed_attention": lambda: (
        (floats(6, 4, D), floats(6, 2, D), floats(6, 2, D), torch.tensor([0, 3, 6])),
        {"max_seqlen": 3, "scale": 0.5}),
    "prefix_attention": lambda: (
        (floats(6, 4, D), floats(6, 2, D), floats(6, 2, D), torch.tensor([0, 3, 4, 6]),
         torch.tensor([-1, 0, 0])), {"max_seqlen": 5, "num_keys": 12, "scale": 0.5}),
    "rotary": lambda: ((floats(N, 3, D), floats(N, 1, D), floats(N, 1, 1), floats(N, 1, 1)), {}),
    "qk_norm_rotary": lambda: (
        (floats(N, 3, D), floats(N, 1, D), floats(D), floats(D), floats(N, 1, 2),
         floats(N, 1, 2)), {"epsilon": 0.1}),
    "paged_attention": lambda: (
        (floats(3, 4, D), floats(3, 2, 2, 4, 2, D), 1, torch.tensor([[2, 0], [1, 0]]),
         torch.tensor([5, 4]), torch.tensor([0, 2, 3])),
        {"max_seqlen_q": 2, "max_kv_len": 5, "scale": 0.5}),
}
KEEP_THE_TYPE = {"rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "swiglu", "gelu",
                 "linear", "packed_attention", "paged_attention", "prefix_attention", "rotary",
                 "qk_norm_rotary"}
"""Layers of a model, whose results have the type of the activations."""


def results(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    """The tensors that an op returns, without its statistics."""
    returned = getattr(ops, name)(*arguments, **keywords)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [value for value in returned if isinstance(value, Tensor)]


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_without_a_kernel_is_refused(name: str, backend: str) -> None:
    arguments, keywords = CALLS[name]()
    with pytest.raises(BackendUnavailableError, match=f"^{name}: backend '{backend}' cannot run"):
        getattr(ops, name)(*arguments, **keywords, backend=backend)
    with use_backend(backend), pytest.raises(BackendUnavailableError):
        getattr(ops, name)(*arguments, **keywords)
    getattr(ops, name)(*arguments, **keywords, backend="torch")


@pytest.mark.parametrize("file", FILES)
def test_doctests(file: str) -> None:
    assert doctest.testmod(importlib.import_module(file)).failed == 0


@pytest.mark.parametrize("name", [n for n in ops.__all__ if not n.endswith(("Stats", "Tokens"))])
def test_docstrings_follow_the_template(name: str) -> None:
    text = inspect.getdoc(getattr(ops, name)) or ""
    for section in ("Args:", "Raises:", "Cost:", "BackendUnavailableError"):
        assert section in text, f"{name} has no {section}"
    assert name not in CALLS or ">>> " in text, f"{name} has no example"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_float32_or_wider_except_of_layers(name: str, dtype: torch.dtype) -> None:
    arguments, keywords = CALLS[name]()

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    arguments = tuple(each_tensor(a, convert) for a in arguments)
    keywords = {key: each_tensor(value, convert) for key, value in keywords.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = dtype if name in KEEP_THE_TYPE else wide
    for result in results(name, arguments, keywords):
        assert result.dtype == expected and result.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_non_contiguous_inputs_give_the_same(name: str) -> None:
    arguments, keywords = CALLS[name]()

    def strided(x: Tensor) -> Tensor:
        """The same values, two elements apart, with something else between them."""
        spread = torch.stack([x, torch.ones_like(x)], dim=-1)
        view = spread[..., 0]
        assert not view.is_contiguous()
        return view

    expected = results(name, arguments, keywords)
    arguments = tuple(each_tensor(a, strided) for a in arguments)
    got = results(name, arguments, keywords)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# These two read lengths on the host in torch.
@pytest.mark.parametrize("name", [name for name in CALLS
                                  if name not in ("paged_attention", "prefix_attention")])
def test_compiles_to_one_graph(name: str) -> None:
    """Plain-torch ops that a compiled training step holds; the graph only, no code generation."""
    torch.compiler.reset()  # all ops share the frame of `call`, which may recompile 8 times
    arguments, keywords = CALLS[name]()
    function = getattr(ops, name)
    arguments[0].requires_grad_()

    def call(*tensors: Tensor) -> Tensor:
        returned = function(*tensors, **keywords)
        return returned[0] if isinstance(returned, tuple) else returned

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*arguments), call(*arguments)
    torch.testing.assert_close(got, expected)
    if expected.requires_grad:
        got, expected = (torch.autograd.grad(x.sum(), arguments[0])[0] for x in (got, expected))
        torch.testing.assert_close(got, expected)
