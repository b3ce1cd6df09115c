"""`python -m benchmarks engine`: what is asked for, the floor, a wrong engine that is caught."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine as bench
from benchmarks.engine_workloads import FIRST, MODELS, Workload, floor, memory, workloads
from benchmarks.results import load
from fastrl.engine.step import DeviceStep


def test_the_grid_begins_with_the_most_telling_and_has_each_once() -> None:
    grid = workloads(small=False)
    assert tuple(grid[: len(FIRST)]) == FIRST
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 2 * 2


def test_lengths_of_a_workload() -> None:
    equal = Workload("small", 8, 5, 16, 4, "equal")
    assert equal.wanted == [16, 16] and equal.num_tokens == 128
    mixed = Workload("small", 4, 5, 32, 1, "mixed")
    assert sorted(mixed.wanted) == [2, 12, 22, 32] and mixed.num_tokens == 68
    assert [len(prompt) for prompt in mixed.prompts(97)] == [5, 5, 5, 5]


def test_floor_and_memory_of_a_llama_with_eight_billion_weights() -> None:
    """By hand: 8,030,261,248 weights, of them 525,336,576 in the embedding, which is looked up."""
    case = Workload("llama-3.1-8b", 32, 128, 512, 1, "equal")
    config, read = MODELS["llama-3.1-8b"], 8_030_261_248 - 525_336_576
    cached = 32 * (512 * 128 + 512 * 511 // 2) * 131_072
    assert floor(case, config, torch.bfloat16) == (
        512 * read * 2 + cached + 32 * 512 * 128256 * 4, 2 * read * 32 * (512 + 128))
    assert memory(case, config, torch.bfloat16) == 8_030_261_248 * 2 + 32 * 640 * 131_072
    eight = Workload("llama-3.1-8b", 32, 128, 512, 8, "equal")
    read_once = 28 * 512 * 128 * 131_072  # of four prompts instead of 32
    assert floor(eight, config, torch.bfloat16)[0] == floor(case, config, torch.bfloat16)[0] \
        - read_once


def test_a_run_writes_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    rows = bench.run_engine("cpu", True, ["fastrl"], path, float("inf"))
    assert [row.status for row in rows] == ["ok", "ok"] and load(path)[1] == rows
    assert [row.extra["tokens"] for row in rows] == [68, 128]
    assert all(row.share_of_floor is not None and row.peak_bytes is not None for row in rows)
    rows = bench.run_engine("cpu", True, ["fastrl"], path, 0.0)
    assert [(row.status, row.reason) for row in rows] == [("skipped", "the time is used up")] * 2


def test_a_wrong_engine_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decode = DeviceStep.decode

    def one_position_off(self: DeviceStep, batch: Any, *arguments: Any, **keywords: Any) -> None:
        batch.kv_lens.sub_(batch.kv_lens.clamp_max(1) * (batch.num_generated == 5))
        decode(self, batch, *arguments, **keywords)

    monkeypatch.setattr(DeviceStep, "decode", one_position_off)
    rows = bench.run_engine("cpu", True, ["fastrl", "transformers"], tmp_path / "e.json",
                            float("inf"))
    assert [row.status for row in rows] == ["wrong", "skipped"] * 2
    assert rows[0].is_failure and "is not what a pass over all tokens gives" in rows[0].reason
