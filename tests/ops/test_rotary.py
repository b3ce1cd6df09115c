"""rotary and qk_norm_rotary: transformers' numbers, geometry, gradients, refusals."""

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as turn_some
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_all
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fastrl.errors import NumericsError, ShapeError
from fastrl.ops import qk_norm_rotary, rotary


def inputs(
    N: int = 5, Hq: int = 4, Hk: int = 2, C: int = 8, R: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query and key, which are views of merged projections, and cos and sin of random angles."""
    query, key, _ = torch.randn(N, Hq + 2 * Hk, C).to(dtype).split([Hq, Hk, Hk], dim=1)
    angles = 6 * torch.rand(N, 1, R // 2)
    return query, key, angles.cos().to(dtype), angles.sin().to(dtype)


def weights(C: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.randn(2, C).to(dtype))


def test_golden() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0, 9.0]]])
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)  # a quarter turn of (1, 0) and (0, 2)
    query, key = rotary(x, 2 * x, cos, sin)
    assert query.tolist() == [[[0.0, -2.0, 1.0, 0.0, 9.0]]]
    assert key.tolist() == [[[0.0, -4.0, 2.0, 0.0, 18.0]]]


@pytest.mark.parametrize("R", [8, 4])
def test_bits_are_the_same_with_and_without_a_gradient(R: int) -> None:
    query, key, cos, sin = inputs(N=33, R=R)
    kept = query.clone()
    with_gradient = rotary(query.clone().requires_grad_(), key.clone().requires_grad_(), cos, sin)
    for ours, theirs in zip(rotary(query, key, cos, sin), with_gradient, strict=True):
        assert theirs.requires_grad and torch.equal(ours, theirs)
    assert torch.equal(query, kept)


def test_golden_with_norms() -> None:
    # Mean square 25 / 2, and with epsilon 3.5 it is 16: (0.75, 1) before the weights.
    x, cos, sin = torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    q_weight, k_weight = torch.tensor([1.0, 10.0]), torch.tensor([4.0, 2.0])
    query, key = qk_norm_rotary(x, x, q_weight, k_weight, cos, sin, epsilon=3.5)
    assert query.tolist() == [[[-10.0, 0.75]]] and key.tolist() == [[[-2.0, 3.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [8, 4])
def test_equals_transformers(dtype: torch.dtype, R: int) -> None:
    """Bit for bit, in half precision too: every product and sum is rounded."""
    query, key, cos, sin = inputs(R=R, dtype=dtype)
    turn = turn_all if R == 8 else turn_some
    expected = turn(query[None].transpose(1, 2), key[None].transpose(1, 2),
                    *(torch.cat([x, x], dim=-1)[:, 0][None] for x in (cos, sin)))
    for ours, theirs in zip(rotary(query, key, cos, sin), expected, strict=True):
        assert torch.equal(ours, theirs[0].transpose(0, 1)) and ours.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_qwen3(dtype: torch.dtype) -> None:
    query, key, cos, sin = inputs(dtype=dtype)
    both = weights(dtype=dtype)
    norm = Qwen3RMSNorm(8, eps=1e-3).to(dtype)
    normed = [torch.func.functional_call(norm, {"weight": weight}, x)
              for x, weight in zip((query, key), both, strict=True)]
    got = qk_norm_rotary(query, key, *both, cos, sin, epsilon=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(got, rotary(*normed, cos, sin), strict=True))


def test_lengths_stay_and_scores_see_the_difference_of_positions() -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    rates = torch.rand(4, dtype=torch.float64)

    def at(position: int) -> tuple[Tensor, Tensor]:
        angles = (position * rates)[None, None]
        return rotary(q, k, angles.cos(), angles.sin())

    torch.testing.assert_close(at(9)[0].norm(), q.norm())
    torch.testing.assert_close((at(9)[0] * at(4)[1]).sum(), (at(5)[0] * at(0)[1]).sum())


def test_gradients() -> None:
    query, key, cos, sin = (x.double() for x in inputs(N=2, Hq=2, Hk=1, C=5, R=4))
    leaves = [x.detach().requires_grad_() for x in (query, key, *weights(5, torch.float64))]
    check = torch.autograd.gradcheck
    assert check(lambda q, k: rotary(q, k, cos, sin), leaves[:2])
    assert check(lambda *t: qk_norm_rotary(*t, cos, sin, epsilon=0.1), leaves)


@pytest.mark.parametrize(("change", "message"), [
    ({"key": torch.zeros(5, 2, 7)}, r"key \[N, Hk, C\]"),
    ({"key": torch.zeros(4, 2, 8)}, r"key \[N, Hk, C\]"),
    ({"key": torch.zeros(5, 2, 8).half()}, "of one type"),
    ({"query": torch.zeros(5, 8)}, r"heads \[N, H, C\]"),
    ({"cos": torch.zeros(5, 1, 3)}, r"cos, sin \[N, 1, R/2\]"),
    ({"cos": torch.zeros(5, 4, 4), "sin": torch.zeros(5, 4, 4)}, r"cos, sin \[N, 1, R/2\]"),
    ({"cos": torch.zeros(5, 1, 5), "sin": torch.zeros(5, 1, 5)}, "R at most C"),
    ({"cos": torch.zeros(5, 1, 4).double()}, "one floating type"),
    ({"sin": torch.zeros(5, 1, 4, device="meta")}, "one device"),
    ({"q_weight": torch.ones(7)}, r"q_weight \[8\]"),
    ({"k_weight": torch.ones(8).double()}, r"k_weight \[8\]"),
], ids=str)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    names = ("query", "key", "cos", "sin")
    arguments = dict(zip(names, inputs(), strict=True))
    arguments |= dict(zip(("q_weight", "k_weight"), weights(), strict=True)) | change
    with pytest.raises(ShapeError, match=message):
        qk_norm_rotary(**arguments, epsilon=0.1)
    if not {"q_weight", "k_weight"} & change.keys():
        with pytest.raises(ShapeError, match=message):
            rotary(**{name: arguments[name] for name in names})


def test_nan_is_found_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_CHECK", "1")
    query, key, cos, sin = inputs()
    with pytest.raises(NumericsError, match="rotary: expected key without NaN"):
        rotary(query, key * torch.nan, cos, sin)
