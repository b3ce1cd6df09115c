"""The rotary Triton kernels against the float64 references; run by test_triton.py."""

from functools import partial

import pytest
import torch
from fastrl_kernels.triton import rotary as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import qk_norm_rotary, rms_norm, rotary
from fastrl.ops.rotary import qk_norm_rotary_reference, rotary_reference

EPSILON = 1e-3
FLOORS = {torch.float32: 1e-6,  # sums in another order
          torch.float16: 2**-11,
          # The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, thrice.
          torch.bfloat16: 3 * 2**-8}
OPS = {"rotary": (rotary, rotary_reference),
       "qk_norm_rotary": (partial(qk_norm_rotary, epsilon=EPSILON),
                          partial(qk_norm_rotary_reference, epsilon=EPSILON))}


def inputs(
    name: str, N: int = 3, Hq: int = 4, Hk: int = 2, C: int = 16, R: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query and key, which are views of merged projections; weights; cos and sin."""
    query, key, _ = torch.randn(N, Hq + 2 * Hk, C).to(dtype).split([Hq, Hk, Hk], dim=1)
    weights = list(torch.randn(2, C).to(dtype)) if name == "qk_norm_rotary" else []
    angles = 6 * torch.rand(N, 1, R // 2)
    return [query, key, *weights, angles.cos().to(dtype), angles.sin().to(dtype)]


def forward_and_backward(function, tensors: list[Tensor], **options) -> list[Tensor]:
    """Outputs, and gradients of all but cos and sin, for gradients that every type holds."""
    leaves = [t.detach().requires_grad_() for t in tensors[:-2]]
    outputs = function(*leaves, *tensors[-2:], **options)
    gradients = [((torch.arange(y.numel()) * (7 + i) % 9 - 3) / 4).view(y.shape).to(y.dtype)
                 for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


def assert_as_good_as_torch(name: str, tensors: list[Tensor]) -> None:
    op, reference = OPS[name]
    ours = forward_and_backward(op, tensors, backend="triton")
    plain = forward_and_backward(reference, tensors)
    truth = forward_and_backward(reference, [t.double() for t in tensors])
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        assert result.dtype == torch_result.dtype and result.shape == wide.shape
        error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
        assert error <= 2 * torch_error + FLOORS[tensors[0].dtype] * wide.abs().max()


# One pair; more heads than a tile; two programs backward and sizes that are no powers of two; as in
# GPT-NeoX: some channels stay; Qwen3's heads.
@pytest.mark.parametrize("N, Hq, Hk, C, R", [
    (1, 1, 1, 2, 2), (2, 40, 2, 64, 64), (kernels.NUM_TOKENS + 2, 3, 1, 24, 24), (3, 2, 2, 80, 20),
    (2, 2, 1, 7, 4), (2, 16, 8, 128, 128)])
@pytest.mark.parametrize("name", OPS)
def test_sizes(name: str, N: int, Hq: int, Hk: int, C: int, R: int) -> None:
    assert_as_good_as_torch(name, inputs(name, N, Hq, Hk, C, R))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("R", [16, 6])
@pytest.mark.parametrize("name", OPS)
def test_narrow_types(name: str, R: int, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(name, inputs(name, R=R, dtype=dtype))


@pytest.mark.parametrize("name", OPS)
def test_not_contiguous(name: str) -> None:
    query, key, *others = inputs(name)
    assert not query.is_contiguous() and kernels.with_neighbours(query) is query
    spread = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
              for x in (query, key, *others)]
    assert_as_good_as_torch(name, spread)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key)]
    assert_as_good_as_torch(name, [*transposed, *others])
    assert_as_good_as_torch(name, [transposed[0], key, *others])  # each with strides of its own
    assert_as_good_as_torch(name, [query, transposed[1], *others])
    assert_as_good_as_torch(name, [query[:1].expand(3, -1, -1), key, *others])
    same_angles = [x[:1].expand(3, 1, 8) for x in others[-2:]]
    assert_as_good_as_torch(name, [query, key, *others[:-2], *same_angles])


@pytest.mark.parametrize("name", OPS)
def test_gradients_that_are_not_contiguous(name: str) -> None:
    tensors, results = inputs(name), []
    for backend in ("triton", "torch"):
        leaves = [t.detach().clone().requires_grad_() for t in tensors[:-2]]
        q, k = OPS[name][0](*leaves, *tensors[-2:], backend=backend)
        wide = torch.arange(2.0 * q.numel()).view(16, 3, 8).permute(1, 2, 0) / 100
        grads = [wide[:, :4], wide[:, 4:6]]
        results.append(torch.autograd.grad((q, k), leaves, grads, retain_graph=True))
        results[-1] += torch.autograd.grad((q * 1).sum() + (k * 1).sum(), leaves)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", OPS)
def test_one_output_without_a_gradient(name: str, which: int) -> None:
    tensors, results = inputs(name), []
    for backend in ("triton", "torch"):
        leaves = [t.detach().clone().requires_grad_() for t in tensors[:-2]]
        output = OPS[name][0](*leaves, *tensors[-2:], backend=backend)[which]
        grads = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
        results.append([torch.zeros(()) if g is None else g for g in grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected.expand_as(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("R", [16, 6])
def test_norms_round_as_rms_norm_does_and_the_rotation_once(R: int) -> None:
    query, key, *weights, cos, sin = inputs("qk_norm_rotary", N=9, R=R, dtype=torch.float16)
    both = qk_norm_rotary(query, key, *weights, cos, sin, epsilon=EPSILON, backend="triton")
    normed = [rms_norm(x, weight, epsilon=EPSILON, backend="triton")
              for x, weight in zip((query, key), weights, strict=True)]
    apart = rotary(*normed, cos, sin, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(both, apart, strict=True))
    exact = rotary_reference(*(x.double() for x in (*normed, cos, sin)))
    assert all(torch.equal(a, b.half()) for a, b in zip(apart, exact, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    tensors = inputs(name, N=kernels.NUM_TOKENS + 1)

    def run(rows: slice) -> list[Tensor]:
        leaves = [t.detach()[rows].requires_grad_() for t in tensors[:2]]
        angles = [t[rows] for t in tensors[-2:]]
        outputs = OPS[name][0](*leaves, *tensors[2:-2], *angles, backend="triton")
        return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)]

    together = run(slice(None))
    for n in (0, 7, kernels.NUM_TOKENS):
        for alone, expected in zip(run(slice(n, n + 1)), together, strict=True):
            assert torch.equal(alone[0], expected[n])


@pytest.mark.parametrize("name", OPS)
def test_nan_is_not_hidden_and_stays_in_its_head(name: str) -> None:
    tensors = [t.clone() for t in inputs(name)]
    tensors[0][1, 2, 3] = torch.nan
    query, key = OPS[name][0](*tensors, backend="triton")
    assert query.isnan().any(dim=2).nonzero().tolist() == [[1, 2]] and not key.isnan().any()


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str) -> None:
    for result in forward_and_backward(OPS[name][0], inputs(name, N=0), backend="triton"):
        assert result.shape in ((0, 4, 16), (0, 2, 16), (16,)) and (result == 0).all()


@pytest.mark.parametrize("name", OPS)
def test_registered_ops(name: str) -> None:
    query, key, *weights, cos, sin = inputs(name, R=6)
    weights = weights or [None, None]
    arguments = (query, key, *weights, cos, sin, EPSILON)
    torch.library.opcheck(torch.ops.fastrl_kernels.rotary, arguments)
    gradients = [torch.randn_like(x) for x in (query, key)]
    torch.library.opcheck(torch.ops.fastrl_kernels.rotary_bwd, (*gradients, *arguments))


@pytest.mark.parametrize("name", OPS)
def test_compiles_to_one_graph(name: str) -> None:
    torch.compiler.reset()
    function, tensors = partial(OPS[name][0], backend="triton"), inputs(name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = forward_and_backward(function, tensors)
    for a, b in zip(eager, forward_and_backward(compiled, tensors), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        rotary(*(x.double() for x in inputs("rotary")), backend="triton")
