"""The SFT and reward benchmark: same rows, same first loss, or no figure."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_train
from benchmarks.bench_train import PARTS, make_rows, step_tokens, tokenized
from benchmarks.peers.common import read_workload
from benchmarks.results import ROOT

WORKLOADS = ROOT / "benchmarks/workloads"
DATA = ROOT.parent / "shared/data"


@pytest.mark.parametrize("task", ["sft", "reward"])
def test_trl_and_fastrl_have_the_same_losses(task: str, tmp_path: Path) -> None:
    """Random rows of mixed lengths; where TRL is not installed fastrl's row alone."""
    path = WORKLOADS / f"{task}_tiny.yaml"
    rows = {row.provider: row
            for row in bench_train.measure(path, tmp_path, ["trl"], threads=1, rounds=1)}
    own = rows["fastrl"]
    assert own.status == "ok" and own.extra["ratio"] == 1.0 and own.extra["tokens_per_s"] > 0
    assert own.rounds == len(own.extra["losses"]) - 1 == 2 and own.peak_bytes is not None
    if bench_train.interpreter("trl") is None:
        assert rows["trl"].reason == "no environment: make peers"
        pytest.skip("no environment: make peers")
    # The same optimiser: losses after its steps agree too.
    assert rows["trl"].status == "ok" and max(rows["trl"].extra["loss_gaps"]) < 1e-4
    assert rows["trl"].extra["tokens"] == own.extra["tokens"]


def fake_run(losses: dict[str, list[float]]) -> Any:
    def run(provider: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {"losses": losses[provider], "seconds": [9.0, 1.0, 3.0], "versions": {},
                "processor_s": [9.0, 2.0 if provider == "trl" else 1.0, 3.0], "peak_bytes": 7,
                "peak_bytes_above_imports": 5}
    return run


def test_another_first_loss_gives_no_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_train, "interpreter", lambda _: Path("python"))
    for gap, status in ((2e-4, "wrong"), (float("nan"), "wrong"), (5e-5, "ok")):
        losses = {"fastrl": [2.0, 1.9, 1.8], "trl": [2.0 + gap, 1.9, 1.8]}
        monkeypatch.setattr(bench_train, "run", fake_run(losses))
        rows = bench_train.measure(WORKLOADS / "sft_tiny.yaml", tmp_path, ["trl"], 1, 1)
        assert [row.status for row in rows] == ["ok", status]
    # Steps 2 and 3 count: 2 + 3 s of processor time against 1 + 3.
    assert rows[1].extra["processor_ratio"] == 1.25 and rows[1].extra["ratio"] == 1.0
    tokens = rows[0].extra["tokens"]
    assert rows[0].extra["tokens_per_s"] == round(sum(tokens[1:]) / 4.0, 1)


def test_tokens_of_a_step_are_those_of_its_rows_without_padding() -> None:
    workload = {"task": "reward", "batch_size": 2}
    row = {"prompt": [3, 4, 5], "chosen": [6], "rejected": [7, 8]}
    assert step_tokens([row, row, {**row, "chosen": [1] * 10}], workload) == [18, 18]
    assert step_tokens([{"prompt": [3], "completion": [4, 5]}], {**workload, "task": "sft"}) == [3]


def texts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"How many is {i}?", "completion": "It is " + f"{i} " * (i + 1)}
            for i in range(count)]


def test_rows_of_a_file_have_an_end_and_fit(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts(40)))
    workload = {**read_workload(WORKLOADS / "sft_tiny.yaml"), "data": "rows.jsonl",
                "batch_size": 4, "num_steps": 5}
    rows = make_rows(workload, tmp_path)
    assert len(rows) == 20 == len({tuple(row["completion"]) for row in rows})
    for row in rows:
        assert row["completion"][-1] == 2 and 2 not in row["prompt"]
        assert len(row["prompt"]) + len(row["completion"]) <= workload["max_tokens"]
    assert len({len(row["completion"]) for row in rows}) > 5
    assert make_rows(workload, tmp_path) == rows
    with pytest.raises(SystemExit, match="expected at least 4000 rows of at most 48 tokens, got"):
        make_rows({**workload, "num_steps": 1000}, tmp_path)
    with pytest.raises(SystemExit, match="--data_root names the folder"):
        make_rows(workload, tmp_path / "absent")


def test_no_token_is_outside_the_vocabulary() -> None:
    rows = tokenized(texts(40), PARTS["sft"], vocab_size=300)
    assert max(token for row in rows for part in row.values() for token in part) < 300


def test_the_real_rows_are_mixed_in_length() -> None:
    if not DATA.exists():
        pytest.skip(f"no {DATA}")
    for task in PARTS:
        workload = read_workload(WORKLOADS / f"{task}_cpu.yaml")
        lengths = sorted(len(row["prompt"]) + len(row[PARTS[task][1]])
                         for row in make_rows(workload, DATA))
        assert lengths[-1] > 4 * lengths[len(lengths) // 4] and lengths[-1] <= 512


def test_names_that_are_no_workload_of_these_tasks_are_refused(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, message in (("nothing", "expected some of .*sft_cpu.*got 'nothing'"),
                          ("ppo_tiny", "a task of sft, reward, got None")):
        monkeypatch.setattr("sys.argv", ["bench_train", "--workloads", name])
        with pytest.raises(SystemExit, match=message):
            bench_train.main()
