"""adamw_step: literal numbers, torch's optimiser, exact masters, pieces, 8 bits, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from fastrl_kernels.multi_tensor import adamw_factors
from torch import Tensor

from fastrl.errors import BackendUnavailableError, ConfigError, ShapeError
from fastrl.ops import adamw, adamw_step, grad_norm
from fastrl.ops.grad_norm import clip_coefficient
from fastrl.state_formats import decode_moment, encode_moment, join_master, split_master

SHAPES = [(7, 5), (5,), (), (3, 1000), (300,), (0,)]
SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-8}


class State:
    """Lists of tensors as an optimiser holds them."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype = torch.float32,
                 is_8bit: bool = False) -> None:
        shapes = [w.shape for w in weights]
        self.weights, self.remainders = [w.clone().to(dtype) for w in weights], []
        if dtype == torch.bfloat16:
            self.weights, self.remainders = map(list, zip(*map(split_master, weights), strict=True))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.first = [torch.zeros(s, dtype=torch.int8 if is_8bit else wide) for s in shapes]
        self.second = [torch.zeros(s, dtype=torch.uint8 if is_8bit else wide) for s in shapes]
        self.scales = [(torch.zeros(-(-w.numel() // 256)), torch.zeros(-(-w.numel() // 256)))
                       for w in weights] if is_8bit else []

    def step(self, gradients: list[Tensor], number: int = 1, **changes: Any) -> None:
        adamw_step(self.weights, gradients, self.first, self.second, self.remainders,
                   step=torch.tensor(number), moment_scales=self.scales, **SETTINGS | changes)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.first, *self.second, *self.remainders,
                *(s for pair in self.scales for s in pair)]


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s) for s in shapes]


def same_bits(one: State, other: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def test_two_steps_by_hand() -> None:
    state = State([torch.tensor([1.0, -2.0], dtype=torch.float64)], torch.float64)
    gradient = [torch.tensor([0.5, 4.0], dtype=torch.float64)]
    settings = {"learning_rate": 0.1, "betas": (0.5, 0.75), "epsilon": 1.0, "weight_decay": 0.1}
    state.step(gradient, **settings)
    # m = g / 2, v = g^2 / 4, both corrected to g and g^2: w * 0.99 - 0.1 g / (|g| + 1).
    torch.testing.assert_close(state.weights[0], torch.tensor(
        [0.99 - 0.05 / 1.5, -1.98 - 0.4 / 5], dtype=torch.float64))
    before = state.weights[0].clone()
    state.step(gradient, 2, scale=torch.tensor(0.0), **settings)
    m, v = gradient[0] / 4 / 0.75, gradient[0].square() * 3 / 16 / (1 - 0.75**2)
    torch.testing.assert_close(state.weights[0], before * 0.99 - 0.1 * m / (v.sqrt() + 1))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_and_a_textbook_in_float64(weight_decay: float) -> None:
    weights = randoms(*SHAPES)
    state = State(weights, torch.float64)
    theirs = [torch.nn.Parameter(w.double()) for w in weights]
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=weight_decay)
    for number in range(1, 101):
        gradients = [g.double() for g in randoms(*SHAPES)]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = 0.5 * gradient
        reference.step()
        state.step(gradients, number, weight_decay=weight_decay, scale=torch.tensor(0.5))
    for ours, parameter in zip(state.weights, theirs, strict=True):
        torch.testing.assert_close(ours, parameter.detach(), rtol=1e-12, atol=1e-12)


def test_every_product_and_sum_is_rounded_by_itself() -> None:
    """The same formula in numpy's float32, bit for bit: nothing is contracted, no root is off."""
    (weight,), f = randoms((70_000,)), np.float32
    state, w = State([weight]), weight.numpy().copy()
    m = v = np.zeros_like(w)
    for number in range(1, 11):
        (gradient,) = randoms((70_000,))
        state.step([gradient], number, weight_decay=0.1, scale=torch.tensor(0.3))
        g = gradient.numpy() * f(0.3)
        m, v = m * f(0.9) + g * f(1 - 0.9), v * f(0.95) + g * f(1 - 0.95) * g
        root = np.sqrt(1 - 0.95**np.float64(number))
        step_size = f(1e-2 * root / (1 - 0.9**np.float64(number)))
        w = w * f(1 - 1e-2 * 0.1) - m * step_size / (np.sqrt(v) + f(1e-8 * root))
    for got, expected in ((state.weights[0], w), (state.first[0], m), (state.second[0], v)):
        assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("is_8bit", [False, True])
def test_bf16_with_remainders_is_the_float32_master_for_1000_steps(is_8bit: bool) -> None:
    weights = randoms(*SHAPES[:4])
    narrow, wide = State(weights, torch.bfloat16, is_8bit), State(weights, is_8bit=is_8bit)
    for number in range(1, 1001):
        gradients = [g.bfloat16() for g in randoms(*SHAPES[:4])]
        changes = {"learning_rate": 1e-4 * (number % 7), "scale": torch.rand(())}
        narrow.step(gradients, number, weight_decay=0.01, **changes)
        wide.step([g.float() for g in gradients], number, weight_decay=0.01, **changes)
    for weight, remainder, exact in zip(narrow.weights, narrow.remainders, wide.weights,
                                        strict=True):
        assert torch.equal(join_master(weight, remainder), exact)
        assert (weight.float() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert all(torch.equal(a, b) for a, b in zip(narrow.first, wide.first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(narrow.second, wide.second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_8bit", [False, True])
def test_bits_do_not_depend_on_pieces_or_on_other_tensors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_8bit: bool
) -> None:
    shapes = [(9, 300), (20,), (3, 5), (1100,), (2, 256), ()]
    weights, gradients = randoms(*shapes), [g.to(dtype) for g in randoms(*shapes)]
    together, alone = State(weights, dtype, is_8bit), [State([w], dtype, is_8bit) for w in weights]
    decayed = [True, False, True, False, False, True]
    monkeypatch.setattr(adamw, "PIECE_ELEMENTS", {"cpu": 1024})
    for number in (1, 2, 3):
        together.step(gradients, number, weight_decay=0.1, decayed=decayed)
    monkeypatch.undo()
    for i, state in enumerate(alone):
        for number in (1, 2, 3):
            state.step([gradients[i]], number, weight_decay=0.1, decayed=[decayed[i]])
        assert torch.equal(state.weights[0], together.weights[i])
        assert torch.equal(state.first[0], together.first[i])
        assert torch.equal(state.second[0], together.second[i])
        if is_8bit:
            assert all(map(torch.equal, state.scales[0], together.scales[i]))


def test_step_count_and_clip_coefficient_are_never_read() -> None:
    """A tensor on the meta device has no value to read; both for torch and for the kernels."""
    weights, gradients, first, second = (
        [torch.ones(300, device="meta"), torch.ones(7, 5, device="meta")] for _ in range(4))
    step, scale = torch.tensor(3, device="meta"), clip_coefficient(grad_norm(gradients), 1.0)
    adamw_step(weights, gradients, first, second, step=step, scale=scale, **SETTINGS)
    factors = adamw_factors(step, 1e-2, (0.9, 0.95), 1e-8, scale)
    assert factors.is_meta and factors.dtype == torch.float32


@pytest.mark.parametrize("is_8bit", [False, True])
def test_compiles_to_one_graph(is_8bit: bool) -> None:
    weights, gradients = randoms((300,), (7, 5)), randoms((300,), (7, 5))
    eager, compiled = (State(weights, is_8bit=is_8bit) for _ in range(2))
    eager.step(gradients, weight_decay=0.1)
    torch.compile(compiled.step, fullgraph=True, backend="aot_eager")(gradients, weight_decay=0.1)
    torch.testing.assert_close(compiled.tensors, eager.tensors)


def test_8bit_steps_use_the_new_moments_before_they_are_rounded() -> None:
    """One step from state that codes hold exactly equals the float32 step, then rounds."""
    weights, gradients = randoms((700,)), randoms((700,))
    state, wide = State(weights, is_8bit=True), State(weights)
    state.step(randoms((700,)))
    m, root = (decode_moment(codes.view(-1), scale) for codes, scale in
               zip((state.first[0], state.second[0]), state.scales[0], strict=True))
    wide.first, wide.second = [m], [root.square()]
    wide.weights = [state.weights[0].clone()]
    state.step(gradients, 2)
    wide.step(gradients, 2)
    assert torch.equal(state.weights[0], wide.weights[0])
    codes, scales = encode_moment(wide.first[0], signed=True)
    assert torch.equal(state.first[0], codes) and torch.equal(state.scales[0][0], scales)


def test_not_contiguous_and_gradients_untouched() -> None:
    weight, gradient = torch.randn(6, 4), torch.randn(6, 4)
    expected, got = State([weight]), State([weight])
    got.weights = [weight.t().contiguous().t()]
    spread = torch.stack([gradient, torch.zeros(6, 4)], dim=-1)[..., 0]
    before = spread.clone()
    expected.step([gradient])
    got.step([spread], scale=torch.tensor(1.0))
    assert not got.weights[0].is_contiguous() and not spread.is_contiguous()
    assert torch.equal(got.weights[0], expected.weights[0]) and torch.equal(spread, before)


@pytest.mark.parametrize("is_8bit", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_weights_and_the_state(bad: float, is_8bit: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        state, gradient = State(randoms((600,)), dtype, is_8bit), torch.ones(600).to(dtype)
        gradient[300] = bad
        state.step([gradient])
        assert state.weights[0][300].isnan() and state.weights[0].isnan().sum() == 1
        state.step([torch.ones(600).to(dtype)], 2)
        assert state.weights[0][300].isnan()


def test_a_learning_rate_of_0_changes_nothing() -> None:
    state, before = State(randoms((50,))), torch.empty(50)
    before.copy_(state.weights[0])
    state.step(randoms((50,)), learning_rate=0.0, weight_decay=1.0)
    assert torch.equal(state.weights[0], before) and state.first[0].abs().min() > 0


def call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "parameters": [torch.zeros(3)], "gradients": [torch.zeros(3)], "first": [torch.zeros(3)],
        "second": [torch.zeros(3)], "step": torch.tensor(1)}
    adamw_step(**arguments | SETTINGS | changes)


@pytest.mark.parametrize("changes, message", [
    ({"parameters": []}, "at least one parameter"),
    ({"parameters": [torch.zeros(3).half()]}, "float32, float64 or bfloat16 parameters, got"),
    ({"gradients": []}, "expected 1 gradients, one for each parameter, got 0"),
    ({"gradients": [torch.zeros(2)]}, r"gradients\[0\] \[3\] torch.float32, got \[2\]"),
    ({"gradients": [torch.zeros(3).half()]}, "got .* torch.float16"),
    ({"first": [torch.zeros(6)[::2]]}, r"first\[0\] to be contiguous"),
    ({"second": [torch.zeros(3, dtype=torch.uint8)]}, r"second\[0\] \[3\] torch.float32"),
    ({"remainders": [torch.zeros(3, dtype=torch.int16)]}, "remainders beside bfloat16"),
    ({"parameters": [torch.zeros(3).bfloat16()]}, "remainders beside bfloat16"),
    ({"step": torch.tensor(1.0)}, "step to be an int64 scalar"),
    ({"scale": torch.ones(1)}, "scale to be a floating point scalar"),
    ({"decayed": []}, "expected 1 entries of decayed and moment_scales, got 0 and 0"),
    ({"moment_scales": [(torch.zeros(1), torch.zeros(1))]}, r"first\[0\] \[3\] torch.int8"),
    ({"first": [torch.zeros(3, dtype=torch.int8)], "second": [torch.zeros(3, dtype=torch.uint8)],
      "moment_scales": [(torch.zeros(1), torch.zeros(2))]}, r"moment_scales\[0\] \[1\] float32"),
    ({"step": torch.tensor(1, device="meta")}, "one device"),
])
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call(**changes)


def test_settings_and_backends_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected learning_rate of at least 0, got -1"):
        call(learning_rate=-1.0)
    with pytest.raises(ConfigError, match="expected epsilon above 0"):
        call(epsilon=0.0)
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendUnavailableError, match=f"^adamw_step: backend '{backend}'"):
            call(backend=backend)
