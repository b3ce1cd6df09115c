"""gather_logprobs' Triton kernels against the float64 reference; run by test_triton.py."""

import math

import pytest
import torch
from fastrl_kernels.triton import logprob
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import gather_logprobs
from fastrl.ops.logprob import gather_logprobs_reference

FLOOR = 1e-6  # float32 sums in another order
BLOCK = logprob.MAX_BLOCK


def forward_and_backward(
    function, logits: Tensor, token_ids: Tensor, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy, and the logits' gradient of a sum with row weights of both signs."""
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = function(leaf, token_ids, **options)
    weights = torch.linspace(-1, 2, 2 * len(logits), dtype=logprobs.dtype)
    (logprobs * weights[::2] + entropy * weights[1::2]).sum().backward()
    return logprobs, entropy, leaf.grad


def assert_as_good_as_torch(
    logits: Tensor, token_ids: Tensor, floor: float = FLOOR, **options
) -> None:
    truth = forward_and_backward(gather_logprobs_reference, logits.double(), token_ids, **options)
    plain = forward_and_backward(gather_logprobs_reference, logits, token_ids, **options)
    ours = forward_and_backward(gather_logprobs, logits, token_ids, backend="triton", **options)
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        assert result.dtype == torch_result.dtype and result.shape == wide.shape
        assert torch.equal(result.isinf(), wide.isinf()) and not result.isnan().any()
        error = (result - wide).nan_to_num().abs().max()
        torch_error = (torch_result - wide).nan_to_num().abs().max()
        largest = wide.masked_fill(wide.isinf(), 0.0).abs().max()
        assert error <= 2 * torch_error + floor * largest + floor


# One column, below a block, one block, one more, GPT-2's and Qwen's vocabulary.
@pytest.mark.parametrize("M, V", [(1, 1), (5, 11), (3, 129), (2, BLOCK), (2, BLOCK + 1),
                                  (2, 50257), (1, 151936)])
def test_sizes(M: int, V: int) -> None:
    assert_as_good_as_torch(3 * torch.randn(M, V), torch.randint(V, (M,)))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
def test_temperature(temperature: float) -> None:
    assert_as_good_as_torch(torch.randn(4, 77), torch.randint(77, (4,)), temperature=temperature)


# The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, 2^-8.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, FLOOR), (torch.bfloat16, 2**-8)])
def test_narrow_logits(dtype: torch.dtype, floor: float) -> None:
    assert_as_good_as_torch(torch.randn(4, 300).to(dtype), torch.randint(300, (4,)), floor)


def test_not_contiguous() -> None:
    token_ids = torch.randint(30, (12,))[::2]
    assert_as_good_as_torch(torch.randn(30, 6).t(), token_ids)
    assert_as_good_as_torch(torch.randn(6, 60)[:, ::2], token_ids)
    assert_as_good_as_torch(torch.randn(1, 30).expand(6, 30), token_ids)


def test_forbidden_columns_and_whole_blocks_of_them() -> None:
    logits = torch.randn(4, 2 * BLOCK + 5)
    logits[:, ::3] = -torch.inf
    logits[1, :BLOCK + 1] = -torch.inf
    logits[2, BLOCK:] = -torch.inf
    logits[3, 7] = -torch.inf
    assert_as_good_as_torch(logits, torch.tensor([1, BLOCK + 2, 2, 7]))  # the last: taken anyway


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
def test_a_row_of_nothing_but_minus_infinity_is_nan_as_in_torch() -> None:
    logits = torch.full((2, 9), -torch.inf)
    logits[1] = torch.randn(9)
    logprobs, entropy = gather_logprobs(logits, torch.tensor([0, 3]), backend="triton")
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [True, False]


def test_extreme_logits_keep_their_precision() -> None:
    logits = 1e4 + torch.randn(3, 500)
    logits[2] = 1e4 * torch.randn(500)
    assert_as_good_as_torch(logits, torch.randint(500, (3,)))
    _, entropy = gather_logprobs(torch.full((1, 1000), 1e4), torch.tensor([0]), backend="triton")
    assert entropy.item() == pytest.approx(math.log(1000), abs=1e-6)


def test_columns_masked_with_the_lowest_number() -> None:
    logits = torch.randn(2, 2 * BLOCK)
    logits[:, BLOCK:] = torch.finfo(torch.float32).min  # the first block that is read
    assert_as_good_as_torch(logits, torch.tensor([1, 2]))


def test_nan_is_not_hidden() -> None:
    logits = torch.randn(2, 9)
    logits[0, 4] = torch.nan
    for result in gather_logprobs(logits, torch.tensor([0, 0]), backend="triton"):
        assert result.isnan().tolist() == [True, False]


def test_a_token_outside_the_vocabulary_is_nan_and_reads_nothing() -> None:
    logprobs, _ = gather_logprobs(torch.randn(2, 9), torch.tensor([-1, 9]), backend="triton")
    assert logprobs.isnan().all()


def test_no_rows() -> None:
    logits = torch.randn(0, 9, requires_grad=True)
    logprobs, entropy = gather_logprobs(logits, torch.zeros(0, dtype=torch.int64),
                                        backend="triton")
    (logprobs + entropy).sum().backward()
    assert logprobs.shape == entropy.shape == (0,) and logits.grad.shape == (0, 9)


def test_one_launch_forward_and_one_backward(launches: list[str]) -> None:
    forward_and_backward(gather_logprobs, torch.randn(3, 40), torch.randint(40, (3,)),
                         backend="triton")
    assert launches == ["_logprobs_fwd_kernel", "_logprobs_bwd_kernel"]


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_without_a_gradient(which: int) -> None:
    logits, token_ids = torch.randn(3, 40), torch.randint(40, (3,))
    gradients = []
    for options in ({"backend": "torch"}, {"backend": "triton"}):
        leaf = logits.clone().requires_grad_()
        gather_logprobs(leaf, token_ids, **options)[which].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, token_ids = torch.randn(4, 300), torch.randint(300, (4,))
    together = gather_logprobs(logits, token_ids, backend="triton")
    for m in range(4):
        row = slice(m, m + 1)
        alone = gather_logprobs(logits[row], token_ids[row], backend="triton")
        assert all(torch.equal(a[0], t[m]) for a, t in zip(alone, together, strict=True))


def test_overwrites_the_logits_only_where_told() -> None:
    values, token_ids = torch.randn(3, BLOCK + 9), torch.randint(BLOCK, (3,))
    gradients = []
    for overwrite in (False, True):
        leaf = values.clone().requires_grad_()
        logits = leaf * 1
        logprobs, entropy = gather_logprobs(logits, token_ids, overwrite_logits=overwrite,
                                            backend="triton")
        (logprobs + entropy).sum().backward(retain_graph=True)
        gradients.append(leaf.grad.clone())
        assert torch.equal(logits, values) is not overwrite
        if overwrite:
            assert torch.equal(logits, leaf.grad)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                logprobs.sum().backward()
    assert torch.equal(*gradients)


def test_rows_that_share_memory_are_not_overwritten() -> None:
    row, token_ids = torch.randn(1, 40, requires_grad=True), torch.tensor([3, 5])
    logits = row.expand(2, 40)
    logprobs, _ = gather_logprobs(logits, token_ids, overwrite_logits=True, backend="triton")
    expected, _ = gather_logprobs(logits, token_ids, backend="torch")
    gradients = [torch.autograd.grad(x.sum(), row)[0] for x in (logprobs, expected)]
    torch.testing.assert_close(*gradients)


def test_registered_ops() -> None:
    logits, token_ids = torch.randn(3, 40), torch.randint(40, (3,))
    torch.library.opcheck(torch.ops.fastrl_kernels.gather_logprobs, (logits, token_ids, 0.7))
    _, entropy, maximum, log_sum = logprob.logprobs_fwd(logits, token_ids, 0.7)
    for dentropy in (None, torch.randn(3)):
        torch.library.opcheck(
            torch.ops.fastrl_kernels.gather_logprobs_bwd,
            (logits, token_ids, entropy, maximum, log_sum, torch.randn(3), dentropy, 0.7))


def test_compiles_to_one_graph() -> None:
    logits, token_ids = torch.randn(3, 40), torch.randint(40, (3,))
    compiled = torch.compile(gather_logprobs, fullgraph=True, backend="aot_eager")
    eager = forward_and_backward(gather_logprobs, logits, token_ids, backend="triton")
    traced = forward_and_backward(compiled, logits, token_ids, backend="triton")
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        gather_logprobs(torch.randn(2, 3).double(), torch.tensor([0, 0]), backend="triton")
