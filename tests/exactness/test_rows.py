"""The sweep that finds how many rows make a row's bits independent of the others."""

import logging

import pytest
import torch
import torch.nn.functional as F

from fastrl.exactness import rows as exactness
from fastrl.exactness.rows import (
    invariant_rows,
    multiplies_by_input,
    row_multiple,
    smallest_invariant_rows,
    weight_shapes,
)
from fastrl.models import CausalLM, DecoderConfig, new_decoder
from fastrl.models.by_input import by_input as stored_by_input
from fastrl.models.by_input import by_tile, tile_columns
from fastrl.models.heads import project_logits


def _model(**changes: int) -> CausalLM:
    sizes = {"vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, **changes}
    return new_decoder(DecoderConfig(
        family="llama", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64,
        rotary_dim=6, **sizes), 0)


def test_every_matrix_is_tried_once() -> None:
    assert weight_shapes(_model()) == {(48, 24), (24, 24), (80, 24), (24, 40), (70, 24)}


@pytest.mark.parametrize("shape", [(64, 64), (512, 64), (53, 20)])
def test_rows_are_equal_from_the_count_found(shape: tuple[int, int]) -> None:
    count = smallest_invariant_rows(shape, torch.float32, torch.get_num_threads())
    assert count is not None
    weight, rows = torch.randn(shape), torch.randn(300, shape[1])
    many = F.linear(rows, weight)
    for num_rows in (count, count + 1, count + 5, 31, 64, 100, 299):
        assert torch.equal(F.linear(rows[:num_rows], weight), many[:num_rows])


@pytest.mark.parametrize(
    ("equal", "expected"),
    [([True, True, True], 1), ([True, True, False], 2), ([True, False, True], 3),
     ([False, True, True], None)],
)
def test_the_first_difference_on_the_way_down_counts(
    equal: list[bool], expected: int | None
) -> None:
    assert exactness._first_of_equal_run(zip((3, 2, 1), equal, strict=True)) == expected


def test_a_shape_without_such_a_count_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exactness, "smallest_invariant_rows",
                        lambda shape, dtype, threads, stored: None if shape == (83, 24) else 5)
    exactness._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        assert invariant_rows(_model(vocab_size=83)) == 5
        assert invariant_rows(_model(vocab_size=83)) == 5
    assert [record.getMessage() for record in caplog.records if "83 x 24" in record.getMessage()]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("by_input", [False, True])
def test_rows_are_counted_for_weights_as_they_are_stored(
    monkeypatch: pytest.MonkeyPatch, by_input: bool
) -> None:
    asked = []
    monkeypatch.setattr(exactness, "smallest_invariant_rows",
                        lambda shape, dtype, threads, stored: asked.append(stored) or 5)
    invariant_rows(_model(), by_input=by_input)
    assert len(asked) >= 5 and set(asked) == {by_input}


@pytest.mark.parametrize("shape", [(64, 64), (512, 64), (53, 20), (9600, 32)])
def test_rows_of_copies_have_the_bits_of_the_weights_from_the_count_found(
    shape: tuple[int, int]
) -> None:
    count = smallest_invariant_rows(shape, torch.float32, torch.get_num_threads(), True)
    assert count is not None
    weight, rows = torch.randn(shape), torch.randn(300, shape[1])
    copy, many = stored_by_input(weight), F.linear(rows, weight)
    columns = tile_columns(shape[0])
    assert bool(columns) == (shape[0] > 500)
    for num_rows in (count, count + 1, count + 5, 31, 64, 100, 299):
        assert torch.equal(F.linear(rows[:num_rows], copy), many[:num_rows])
        if columns:
            by_tiles = project_logits(rows[:num_rows], by_tile(weight, columns))
            assert torch.equal(by_tiles, many[:num_rows])


@pytest.mark.parametrize("copy", ["stored_by_input", "by_tile"])
def test_copies_are_left_out_where_their_products_have_other_bits(
    monkeypatch: pytest.MonkeyPatch, copy: str
) -> None:
    model = _model(vocab_size=256)
    smallest_invariant_rows.cache_clear()
    assert multiplies_by_input(model)
    make = getattr(exactness, copy)
    monkeypatch.setattr(exactness, copy, lambda *args: make(*args) * (1 + 2**-20))
    smallest_invariant_rows.cache_clear()
    assert not multiplies_by_input(model)
    smallest_invariant_rows.cache_clear()


def test_row_multiple_leaves_no_elements_over() -> None:
    # 16 float32 numbers a register, two registers at a time: 24 * 4, 40 * 4, 70 * 16 divide by 32.
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert row_multiple(_model()) == 16 * threads
            assert row_multiple(_model(vocab_size=64)) == 4 * threads
    finally:
        torch.set_num_threads(before)
