"""Sizes and groups of dense calls; what they compute is tested with the ops that make them."""

import pytest

from fastrl.dense_attention import (
    SLOT_UNIT,
    _arithmetic_runs,
    _dense_shape,
    size_bucket,
    slots_read,
)


def test_size_buckets() -> None:
    assert [size_bucket(n) for n in (1, 2, 7, 8, 9, 15, 17, 20, 21, 33)] == [
        1, 2, 7, 8, 10, 16, 20, 20, 24, 40]


@pytest.mark.parametrize(
    ("pages", "expected"),
    [([4], [[4]]), ([2, 3, 4], [[2, 3, 4]]), ([8, 2, 5], [[2, 5, 8]]),
     ([1, 1, 2], [[1], [1, 2]]), ([0, 5, 6, 7], [[0, 5], [6, 7]])],
)
def test_arithmetic_runs(pages: list[int], expected: list[list[int]]) -> None:
    runs = _arithmetic_runs(pages, list(range(len(pages))))
    assert [[pages[row] for row in rows] for rows, _ in runs] == expected
    assert [list(range(99))[taken] for _, taken in runs if taken is not None] == expected


def test_slots_read_covers_what_the_dense_kernel_reads() -> None:
    for kv_len in range(1, 200):
        for num_rows, channels in ((1, 48), (3, 8), (7, 4), (2, 64)):
            slots = size_bucket(-(-kv_len // SLOT_UNIT)) * SLOT_UNIT
            assert kv_len <= _dense_shape(num_rows, slots, channels)[1] <= slots_read(kv_len)
