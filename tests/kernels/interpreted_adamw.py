"""adamw_step's Triton kernel gives the bits of the reference on a CPU; run by test_triton.py."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from fastrl_kernels import multi_tensor
from fastrl_kernels.triton import adamw as kernel
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import adamw_step
from fastrl.state_formats import split_master

SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-8,
                            "weight_decay": 0.1}
# A scalar, below and at a block of 256, several blocks that do not fill, more than one program.
SHAPES = [(), (7, 5), (256,), (3, 1000), (2, 8200), (0,), (64, 32)]
KINDS = pytest.mark.parametrize("dtype, is_8bit", [
    (torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
State = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]


def make(dtype: torch.dtype, is_8bit: bool, shapes: list[tuple[int, ...]] = SHAPES) -> State:
    """Weights, m, v, remainders and scales, with a history of some sort."""
    weights, remainders = [torch.randn(s) for s in shapes], []
    if dtype == torch.bfloat16:
        weights, remainders = map(list, zip(*map(split_master, weights), strict=True))
    first, second, scales = [torch.randn(s) for s in shapes], [torch.rand(s) for s in shapes], []
    if is_8bit:
        first = [torch.randint(-127, 128, s).to(torch.int8) for s in shapes]
        second = [torch.randint(256, s).to(torch.uint8) for s in shapes]
        blocks = [-(-w.numel() // 256) for w in weights]
        scales = [(torch.rand(n), torch.rand(n)) for n in blocks]
    return weights, first, second, remainders, scales


def copy(state: State, device: str | None = None) -> State:
    """Copies on a device; None: where they are."""
    def each(tensors: Iterable[Tensor]) -> list[Tensor]:
        return [x.to(device or x.device, copy=True) for x in tensors]

    *columns, scales = state
    pairs = [each(pair) for pair in scales]
    return (*map(each, columns), [(a, b) for a, b in pairs])  # type: ignore[return-value]


def run(state: State, gradients: list[Tensor], backend: str, number: int = 5, **changes: Any
        ) -> None:
    weights, first, second, remainders, scales = state
    device = weights[0].device
    adamw_step(weights, [g.to(device) for g in gradients], first, second, remainders,
               step=torch.tensor(number, device=device), moment_scales=scales, backend=backend,
               **SETTINGS | changes)


def flat(state: State) -> list[Tensor]:
    return [*state[0], *state[1], *state[2], *state[3], *(s for pair in state[4] for s in pair)]


def same_bits(one: State, other: State) -> bool:
    """Equal, and NaN where NaN."""
    return all(torch.equal(a.cpu().nan_to_num(77.0), b.cpu().nan_to_num(77.0))
               for a, b in zip(flat(one), flat(other), strict=True))


@KINDS
def test_three_steps_give_the_bits_of_the_reference(dtype: torch.dtype, is_8bit: bool) -> None:
    ours = make(dtype, is_8bit)
    theirs = copy(ours, "cpu")  # on a GPU torch itself contracts products and sums
    decayed = [i % 2 == 0 for i in range(len(SHAPES))]
    for number in (1, 2, 1000):
        # Gradients from 1e-6 to 1e6, so that codes of every size and denormal shares come up.
        gradients = [(torch.randn(s) * 10 ** (2 * torch.randn(s))).to(dtype) for s in SHAPES]
        for state, backend in ((ours, "triton"), (theirs, "torch")):
            run(state, gradients, backend, number, decayed=decayed, scale=torch.tensor(
                0.37, dtype=torch.float64, device=state[0][0].device))
    assert same_bits(ours, theirs)


@KINDS
def test_not_contiguous_and_misaligned(dtype: torch.dtype, is_8bit: bool) -> None:
    ours = make(dtype, is_8bit, [(40, 30), (640,)])
    if not is_8bit:  # an address that is not a multiple of 16
        ours[1][1] = torch.randn(641)[1:]
    theirs = copy(ours, "cpu")
    ours[0][0] = ours[0][0].t().contiguous().t()
    gradients = [torch.randn(30, 40).to(dtype).t(), torch.randn(1280).to(dtype)[::2]]
    assert not ours[0][0].is_contiguous()
    run(ours, gradients, "triton")
    run(theirs, gradients, "torch")
    assert same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity / infinity in numpy
@KINDS
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype, is_8bit: bool) -> None:
    ours = make(dtype, is_8bit, [(700,)])
    theirs = copy(ours, "cpu")
    gradient = torch.randn(700)
    gradient[300], gradient[600] = torch.nan, torch.inf
    run(ours, [gradient.to(dtype)], "triton")
    run(theirs, [gradient.to(dtype)], "torch")
    assert ours[0][0].isnan().nonzero().flatten().tolist() == [300, 600]
    assert same_bits(ours, theirs)


def test_a_nan_of_a_gpu_stays_nan_in_bf16() -> None:
    state = make(torch.bfloat16, False, [(16,)])
    state[1][0].view(torch.int32)[3] = 0x7FFFFFFF  # reaches the weight with its bits
    run(state, [torch.randn(16).bfloat16()], "triton")
    assert state[0][0].isnan().nonzero().flatten().tolist() == [3]


def test_zero_gradients_on_a_new_state_leave_zeros() -> None:
    for is_8bit in (False, True):
        weights, first, second, remainders, scales = make(torch.float32, is_8bit, [(300,)])
        for tensor in (*first, *second, *(s for pair in scales for s in pair)):
            tensor.zero_()
        state = (weights, first, second, remainders, scales)
        before = weights[0].clone()
        run(state, [torch.zeros(300)], "triton", 1, weight_decay=0.0)
        assert torch.equal(weights[0], before) and all((x == 0).all() for x in flat(state)[1:])


def test_a_tensor_does_not_depend_on_the_others() -> None:
    together = make(torch.float32, True)
    alone = copy(together)
    gradients = [torch.randn(s) for s in SHAPES]
    run(together, gradients, "triton")
    for i in range(len(SHAPES)):
        one = tuple(column[i:i + 1] for column in alone)
        run(one, gradients[i:i + 1], "triton")  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(flat(together), flat(alone), strict=True))


def test_nothing_beyond_a_tensor_is_written() -> None:
    """Every tensor is a piece of a larger one whose ends must keep their values."""
    state = make(torch.bfloat16, True, [(300,)])
    names = [*state[:4], list(state[4][0])]
    frames = [[torch.cat([x.new_full((32,), 7), x, x.new_full((600,), 7)]) for x in column]
              for column in names]
    inner = [[f[32:32 + x.numel()] for f, x in zip(frame, column, strict=True)]
             for frame, column in zip(frames, names, strict=True)]
    run((*inner[:4], [tuple(inner[4])]), [torch.randn(300).bfloat16()], "triton")  # type: ignore
    for frame, column in zip(frames, inner, strict=True):
        for f, x in zip(frame, column, strict=True):
            assert (f[:32] == 7).all() and (f[32 + x.numel():] == 7).all()


def test_the_table_is_built_again_only_when_something_moves() -> None:
    state, gradients = make(torch.float32, False, [(64,), (5,)]), [torch.randn(64), torch.randn(5)]
    run(state, gradients, "triton")
    misses = multi_tensor.tensor_table.cache_info().misses
    run(state, gradients, "triton", 6)
    assert multi_tensor.tensor_table.cache_info().misses == misses
    moved = gradients[0].clone()
    run(state, [moved, gradients[1]], "triton", 7)
    assert multi_tensor.tensor_table.cache_info().misses == misses + 1  # that of the aligned one


def test_autograd_refuses_the_old_weights() -> None:
    state = make(torch.float32, False, [(8,)])
    weight = state[0][0].requires_grad_()
    loss = (weight * weight).sum()
    run(state, [torch.randn(8)], "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiles_to_one_graph_and_passes_opcheck() -> None:
    state = make(torch.bfloat16, True, [(300,), (16,)])
    eager, gradients = copy(state), [torch.randn(300).bfloat16(), torch.randn(16).bfloat16()]

    def step(*tensors: Tensor) -> None:
        weights, first, second, remainders = (list(tensors[i:i + 2]) for i in range(0, 8, 2))
        adamw_step(weights, gradients, first, second, remainders, step=tensors[8],
                   moment_scales=[tensors[9:11], tensors[11:13]], backend="triton", **SETTINGS)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(*state[0], *state[1], *state[2], *state[3], torch.tensor(5), *state[4][0],
             *state[4][1])
    run(eager, gradients, "triton")
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(eager), strict=True))
    weights, first, second, remainders, scales = state
    factors = multi_tensor.adamw_factors(torch.tensor(1), 0.1, (0.9, 0.95), 1e-8, None)
    torch.library.opcheck(torch.ops.fastrl_kernels.adamw_step, (
        weights, gradients, first, second, remainders, [s for pair in scales for s in pair],
        factors, 0.9, 0.95, 1.0, [True, False]))


def test_float16_and_float64_are_refused() -> None:
    assert kernel.supports("cuda", torch.float16) == (
        "weights are float32, or bfloat16 with remainders, not float16")
    wide = [torch.zeros(2, dtype=torch.float64) for _ in range(4)]
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        adamw_step(*([x] for x in wide), step=torch.tensor(1), backend="triton", **SETTINGS)
