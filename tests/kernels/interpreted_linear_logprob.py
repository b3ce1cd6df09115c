"""linear_logprobs with Triton kernels against the float64 reference; run by
test_triton.py."""

import pytest
import torch
from fastrl_kernels.head_chunks import chunk_slices
from fastrl_kernels.triton import linear_logprob
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import linear_logprobs
from fastrl.ops.linear_logprob import linear_logprobs_reference

FLOOR = 2e-6  # float32 sums in another order


class Case:
    """Inputs of one call, and what comes out of it, gradients included."""

    def __init__(self, M: int = 9, D: int = 7, V: int = 130,
                 dtype: torch.dtype = torch.float32) -> None:
        self.hidden, self.weight = torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype)
        self.bias: Tensor | None = torch.randn(V).to(dtype)
        self.token_ids = torch.randint(V, (M,))

    def run(self, function=linear_logprobs, double: bool = False, **options) -> list[Tensor]:
        leaves = [None if x is None else (x.double() if double else x).detach().requires_grad_()
                  for x in (self.hidden, self.weight, self.bias)]
        hidden, weight, bias = leaves
        logprobs, entropy = function(hidden, weight, self.token_ids, bias=bias, **options)
        weights = torch.linspace(-1, 2, 2 * len(hidden), dtype=logprobs.dtype)
        (logprobs * weights[::2] + entropy * weights[1::2]).sum().backward()
        return [logprobs, entropy, *(x.grad for x in leaves if x is not None)]

    def assert_as_good_as_torch(self, floor: float = FLOOR, chunk_tokens: int | None = None,
                                **options) -> None:
        truth = self.run(linear_logprobs_reference, double=True, **options)
        plain = self.run(linear_logprobs_reference, **options)
        ours = self.run(backend="triton", chunk_tokens=chunk_tokens, **options)
        for wide, torch_result, result in zip(truth, plain, ours, strict=True):
            assert result.dtype == torch_result.dtype and result.shape == wide.shape
            error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + floor * wide.abs().max()


# One of each; chunks of one, of unequal size, of all; a vocabulary of several blocks.
@pytest.mark.parametrize("M, D, V, chunk_tokens", [(1, 1, 1, None), (9, 7, 130, 1), (9, 7, 130, 4),
                                                   (9, 7, 130, None), (3, 4, 9001, 2)])
def test_sizes(M: int, D: int, V: int, chunk_tokens: int | None) -> None:
    Case(M, D, V).assert_as_good_as_torch(chunk_tokens=chunk_tokens)


def test_without_a_bias() -> None:
    case = Case()
    case.bias = None
    case.assert_as_good_as_torch()


def test_temperature() -> None:
    Case().assert_as_good_as_torch(temperature=0.6)


# Their gradient of the logits lies in half of each row, over several blocks. The interpreter cuts
# a float32 to bfloat16 where a GPU rounds: 2^-8.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, 2**-10), (torch.bfloat16, 2**-8)])
def test_half_precision(dtype: torch.dtype, floor: float) -> None:
    Case(V=9001, dtype=dtype).assert_as_good_as_torch(floor, chunk_tokens=4)


def test_two_dtypes() -> None:
    case = Case()
    case.hidden = case.hidden.bfloat16()
    case.assert_as_good_as_torch(2**-8)


def test_not_contiguous() -> None:
    case = Case()
    case.hidden = case.hidden.t().contiguous().t()
    case.weight = case.weight.t().contiguous().t()
    case.token_ids = case.token_ids.repeat_interleave(2)[::2]
    case.bias = case.bias.repeat_interleave(2)[::2]
    case.assert_as_good_as_torch(chunk_tokens=4)


def test_forbidden_tokens() -> None:
    case = Case()
    case.bias[::3] = -torch.inf
    case.token_ids = case.token_ids // 3 * 3 + 1
    case.token_ids.clamp_(max=128)
    case.assert_as_good_as_torch()


def test_no_tokens() -> None:
    results = Case(M=0).run(backend="triton")
    assert results[0].shape == results[1].shape == (0,)
    assert all((gradient == 0).all() for gradient in results[2:])


def test_only_the_gradients_asked_for() -> None:
    case = Case()
    weight = case.weight.requires_grad_()
    logprobs, _ = linear_logprobs(case.hidden, weight, case.token_ids, backend="triton")
    logprobs.sum().backward()
    assert weight.grad is not None and case.hidden.grad is None
    with torch.no_grad():
        entropy = linear_logprobs(case.hidden, weight, case.token_ids, backend="triton")[1]
    assert not entropy.requires_grad


def test_one_chunk_of_logits_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = Case(M=64, V=500), []
    new_chunk = linear_logprob.new_chunk
    monkeypatch.setattr(linear_logprob, "new_chunk",
                        lambda *args: made.append(new_chunk(*args)) or made[-1])
    case.run(backend="triton", chunk_tokens=8)
    assert [tuple(buffer.shape) for buffer in made] == [(8, 500), (8, 500)]


def test_chunks_cover_all_tokens_in_whole_tiles() -> None:
    row_bytes = 4 * 151936
    assert chunk_slices(8192, row_bytes, None) == [slice(i, i + 1024) for i in range(0, 8192, 1024)]
    assert [s.stop - s.start for s in chunk_slices(2500, row_bytes, None)] == [896, 896, 708]
    assert chunk_slices(5, row_bytes, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert chunk_slices(0, row_bytes, None) == []
    assert chunk_slices(3, 2**40, None) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_gradients_of_all_chunks_are_added_up_in_float32() -> None:
    """256 chunks whose contributions a sum in half precision would round away."""
    dlogits, hidden = torch.randn(256, 50).half(), torch.rand(256, 8).half()
    weight, bias = torch.randn(50, 8).half(), torch.randn(50).half()
    gradients = linear_logprob.new_gradients(hidden, weight, bias, (True, True, True))
    for m in range(256):
        row = slice(m, m + 1)
        linear_logprob.add_head_gradients(dlogits[row], hidden[row], weight, row, gradients)
    wide = dlogits.double()
    truths = (wide @ weight.double(), wide.T @ hidden.double(), wide.sum(dim=0))
    for gradient, truth in zip(gradients, truths, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=1e-4)


def test_registered_ops() -> None:
    case = Case()
    inputs = (case.hidden, case.weight, case.bias, case.token_ids)
    for keeps_rows in (False, True):
        torch.library.opcheck(torch.ops.fastrl_kernels.linear_logprobs,
                              (*inputs, 0.7, 4, "chunked", keeps_rows))
    _, *rows = linear_logprob.linear_logprobs_fwd(*inputs, 0.7, 4, "chunked", False)
    for dentropy, needs in ((None, [True, True, True]), (torch.randn(9), [False, True, False])):
        torch.library.opcheck(torch.ops.fastrl_kernels.linear_logprobs_bwd,
                              (*inputs, *rows, torch.randn(9), dentropy, 0.7, 4, False, needs))


def test_compiles_to_one_graph() -> None:
    case = Case()
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    for a, b in zip(case.run(backend="triton"), case.run(compiled, backend="triton"), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    case = Case(dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        case.run(backend="triton")
