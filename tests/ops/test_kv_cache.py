"""write_kv, rotary_write_kv and copy_pages against their references."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.errors import BackendUnavailableError, ShapeError
from fastrl.ops import copy_pages, qk_norm_rotary, rotary, rotary_write_kv, write_kv
from fastrl.ops.kv_cache import (
    _write_kv_unseen,
    rotary_write_kv_reference,
    write_kv_reference,
)
from fastrl.paged_plan import PagedPlan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slots", [[0, 5, 19, 7], [-1, 3, -1, 4], [-1, -1, -1, -1]], ids=str)
def test_equals_reference_and_leaves_the_rest_alone(slots: list[int], dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 4, 3, 5, dtype=dtype).unbind()
    pages = torch.randn(5, 2, 2, 4, 3, 5, dtype=dtype)
    expected = pages.clone()
    write_kv(key, value, pages, 1, torch.tensor(slots))
    write_kv_reference(key, value, expected, 1, torch.tensor(slots))
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("slots", [[0, 5, 19, 7], [-1, 3, -1, 4]], ids=str)
def test_layers_of_one_pass_write_to_the_places_that_the_first_found(slots: list[int]) -> None:
    heads, pages = torch.randn(2, 4, 5, 6), torch.randn(5, 2, 2, 4, 2, 6)
    expected, plan = pages.clone(), PagedPlan(is_settled=True)
    angles = {"cos": torch.randn(4, 1, 2), "sin": torch.randn(4, 1, 2)}
    for layer in (0, 1):
        query = rotary_write_kv(heads[layer], pages, layer, torch.tensor(slots), **angles,
                                plan=plan)
        torch.testing.assert_close(query, rotary_write_kv_reference(
            heads[layer], expected, layer, torch.tensor(slots), **angles), rtol=0, atol=0)
        write_kv(heads[layer, :, :2], heads[layer, :, 2:4], pages, layer,
                 torch.tensor(slots).flip(0), plan=plan)  # the plan counts
        write_kv_reference(heads[layer, :, :2], heads[layer, :, 2:4], expected, layer,
                           torch.tensor(slots))
        assert torch.equal(pages, expected)


def test_golden_layout() -> None:
    pages = torch.zeros(3, 2, 2, 4, 1, 1)
    write_kv(torch.tensor([[[7.0]]]), torch.tensor([[[9.0]]]), pages, 1, torch.tensor([2 * 4 + 3]))
    assert pages[2, 1, 0, 3] == 7 and pages[2, 1, 1, 3] == 9 and pages.sum() == 16


def test_non_contiguous_inputs() -> None:
    merged = torch.randn(4, 9, 5)
    pages, expected = torch.zeros(2, 1, 2, 4, 3, 5), torch.zeros(2, 1, 2, 4, 3, 5)
    slots = torch.tensor([6, 1, 2, 3])
    write_kv(merged[:, 3:6], merged[:, 6:], pages, 0, slots)
    write_kv(merged[:, 3:6].clone(), merged[:, 6:].clone(), expected, 0, slots)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 3, 6)}, "as the pages hold"),
        ({"value": torch.zeros(1, 3, 5)}, "as the pages hold"),
        ({"key": torch.zeros(2, 3, 5).double(), "value": torch.zeros(2, 3, 5).double()}, "dtype"),
        ({"kv_pages": torch.zeros(5, 2, 2, 4, 15)}, "expected kv_pages"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64)}, "slot_mapping"),
        ({"slot_mapping": torch.zeros(2)}, "slot_mapping"),
        ({"layer": 2}, "layer from 0 to 1"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {"key": torch.zeros(2, 3, 5), "value": torch.zeros(2, 3, 5),
                 "kv_pages": torch.zeros(5, 2, 2, 4, 3, 5), "layer": 0,
                 "slot_mapping": torch.tensor([0, 1])} | change
    with pytest.raises(ShapeError, match=message):
        write_kv(**arguments)


def test_a_backend_that_is_not_there_is_refused() -> None:
    x = torch.zeros(1, 3, 5)
    with pytest.raises(BackendUnavailableError, match="write_kv"):
        write_kv(x, x, torch.zeros(1, 1, 2, 4, 3, 5), 0, torch.tensor([0]), backend="triton")


class NoLookAtValues(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert not {"_local_scalar_dense", "nonzero", "item", "equal"} & set(str(func).split("."))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("slots", [[0, 5, 19, 7], [-1, 3, -1, 0], [-1] * 4, []], ids=str)
def test_on_a_gpu_torch_writes_without_a_look_at_the_slots(slots: list[int]) -> None:
    key, value = torch.randn(2, len(slots), 3, 5)
    pages, mapping = torch.randn(5, 2, 2, 4, 3, 5), torch.tensor(slots, dtype=torch.int64)
    expected = pages.clone()
    with NoLookAtValues():
        _write_kv_unseen(key, value, pages, 1, mapping)
    write_kv_reference(key, value, expected, 1, mapping)
    assert torch.equal(pages, expected)
    with pytest.raises(AssertionError), NoLookAtValues():
        write_kv(key, value, pages, 1, mapping)  # the CPU's way does look


def merged(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Projections of four tokens, 4 + 2 + 2 heads of 6 channels; angles and weights."""
    angles, weights = torch.rand(4, 1, 2), torch.randn(2, 6).to(dtype)
    return torch.randn(4, 8, 6).to(dtype), {
        "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype),
        "q_weight": weights[0], "k_weight": weights[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("names", [(), ("cos", "sin"), ("q_weight", "k_weight"),
                                   ("cos", "sin", "q_weight", "k_weight")], ids=str)
def test_rotary_write_kv_is_rotary_then_write_kv(
    names: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Bit for bit, and the reference too."""
    heads, everything = merged(dtype)
    options = {name: everything[name] for name in names}
    slots = torch.tensor([7, -1, 0, 13])
    first = torch.randn(4, 2, 2, 4, 2, 6).to(dtype)
    results = []
    for function in (rotary_write_kv, rotary_write_kv_reference):
        pages = first.clone()
        results.append((function(heads, pages, 1, slots, **options, epsilon=0.1), pages))
    query, key, value = heads.split([4, 2, 2], dim=1)
    still = torch.zeros(4, 1, 0, dtype=dtype)
    cos, sin = options.get("cos", still), options.get("sin", still)
    if "q_weight" in names:
        query, key = qk_norm_rotary(query, key, options["q_weight"], options["k_weight"], cos, sin,
                                    epsilon=0.1)
    else:
        query, key = rotary(query, key, cos, sin)
    pages = first.clone()
    write_kv(key, value, pages, 1, slots)
    for got in results:
        assert torch.equal(got[0], query) and torch.equal(got[1], pages)


def test_writing_leaves_no_gradient_in_the_pages() -> None:
    pages = torch.zeros(1, 1, 2, 4, 1, 4)
    heads, one = torch.ones(1, 3, 4, requires_grad=True), torch.ones(1, 1, 2)
    write_kv(heads[:, :1], heads[:, :1], pages, 0, torch.tensor([0]))
    query = rotary_write_kv(heads, pages, 0, torch.tensor([1]), cos=one, sin=0 * one)
    assert not pages.requires_grad and not query.requires_grad


def test_rotary_write_kv_golden() -> None:
    """A quarter turn, (1, 0) -> (0, 1) and (0, 2) -> (-2, 0), and none."""
    heads = torch.tensor([[[1.0, 0], [0, 2], [5, 6]], [[1, 0], [0, 2], [7, 8]]])
    pages, cos = torch.zeros(2, 1, 2, 2, 1, 2), torch.tensor([0.0, 1]).view(2, 1, 1)
    query = rotary_write_kv(heads, pages, 0, torch.tensor([3, 0]), cos=cos, sin=1 - cos)
    assert query.tolist() == [[[0, 1]], [[1, 0]]]
    assert pages[1, 0, :, 1, 0].tolist() == [[-2, 0], [5, 6]]
    assert pages[0, 0, :, 0, 0].tolist() == [[0, 2], [7, 8]] and pages.abs().sum() == 30


@pytest.mark.parametrize(("change", "message"), [
    ({"heads": torch.zeros(4, 8, 5)}, r"heads \[N, Hq \+ 2 \* 2, 6\]"),
    ({"heads": torch.zeros(4, 4, 6)}, r"heads \[N, Hq"),
    ({"heads": torch.zeros(4, 8, 6).double()}, r"in torch.float32"),
    ({"kv_pages": torch.zeros(3, 1, 2, 6, 4, 2).transpose(3, 5)}, "contiguous"),
    ({"slot_mapping": torch.zeros(3, dtype=torch.int64)}, "slot_mapping"),
    ({"layer": 1}, "layer from 0 to 0"),
    ({"cos": None}, "both of cos and sin"),
    ({"k_weight": None}, "both of q_weight and k_weight"),
    ({"cos": torch.zeros(4, 1, 1)}, "cos, sin"),
    ({"q_weight": torch.ones(5)}, r"q_weight \[6\]"),
    ({"slot_mapping": torch.zeros(4, dtype=torch.int64, device="meta")}, "one device"),
], ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_bad_heads(change: dict[str, object], message: str) -> None:
    heads, options = merged()
    arguments = {"heads": heads, "kv_pages": torch.zeros(3, 1, 2, 4, 2, 6), "layer": 0,
                 "slot_mapping": torch.arange(4), **options} | change
    with pytest.raises(ShapeError, match=message):
        rotary_write_kv(**arguments)


def test_copy_pages() -> None:
    pages = torch.randn(6, 2, 2, 4, 3, 5)
    before = pages.clone()
    copy_pages(pages, torch.tensor([5, 5, 0]), torch.tensor([1, 2, 4]))
    assert torch.equal(pages, before[[0, 5, 5, 3, 0, 5]])
    nothing = torch.zeros(0, dtype=torch.int64)
    copy_pages(pages, nothing, nothing)
    assert torch.equal(pages, before[[0, 5, 5, 3, 0, 5]])


def test_bad_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, one = torch.zeros(6, 2, 2, 4, 3, 5), torch.tensor([1])
    with pytest.raises(ShapeError, match=r"sources and targets \[F\] int64"):
        copy_pages(pages, one, torch.tensor([1, 2]))
    with pytest.raises(ShapeError, match=r"sources and targets \[F\] int64"):
        copy_pages(pages, one.int(), one)
    with pytest.raises(ShapeError, match="contiguous"):
        copy_pages(pages.transpose(0, 1), one, one)
    monkeypatch.setenv("FASTRL_CHECK", "1")
    with pytest.raises(ShapeError, match="targets from 0 to 5, got 6"):
        copy_pages(pages, one, torch.tensor([6]))
    with pytest.raises(ShapeError, match="none that is a source"):
        copy_pages(pages, torch.tensor([1, 2]), torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="targets that differ"):
        copy_pages(pages, torch.tensor([1, 2]), torch.tensor([0, 0]))
