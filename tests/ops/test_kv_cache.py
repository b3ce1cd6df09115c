"""write_kv against its token-by-token reference."""

import pytest
import torch

from fastrl.errors import BackendUnavailableError, ShapeError
from fastrl.ops.kv_cache import write_kv, write_kv_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slots", [[0, 5, 19, 7], [-1, 3, -1, 4], [-1, -1, -1, -1]], ids=str)
def test_equals_reference_and_leaves_the_rest_alone(slots: list[int], dtype: torch.dtype) -> None:
    key, value = torch.randn(2, 4, 3, 5, dtype=dtype).unbind()
    pages = torch.randn(5, 2, 2, 4, 3, 5, dtype=dtype)
    expected = pages.clone()
    write_kv(key, value, pages, 1, torch.tensor(slots))
    write_kv_reference(key, value, expected, 1, torch.tensor(slots))
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
