"""SFT and reward training beside those of other trainers, on the same rows of mixed lengths.

    make peers
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.bench_train --data_root ../shared/data

Every provider is a process of its own, `benchmarks/peers/<provider>_<task>.py`, in turns, with the
same checkpoint, the same token ids in the same batches and AdamW with the same settings. A
tokenizer of the workload's vocabulary is made from the rows themselves. The loss of the first batch
has to agree to 1e-4, or there is no figure; a step's tokens are those of its rows without padding,
a prompt counted with each of its completions. The first step of a process warms up. Ratios compare
all timed steps together, by clock and by processor time.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_ppo import interpreter, make_models, run
from benchmarks.peers.common import read_workload
from benchmarks.results import ROOT, Row, file_name, head, save
from benchmarks.timing import Timing

TOLERANCE = 1e-4
"""Largest difference of the first batch's loss."""
PARTS = {"sft": ("prompt", "completion"), "reward": ("prompt", "chosen", "rejected")}
"""Task -> what a row has."""
Rows = list[dict[str, list[int]]]


def read_texts(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a file of demonstrations or comparisons as text; the turns of a chat are lines.

    Raises:
        SystemExit: when there is no such file.
    """
    if not path.is_file():
        raise SystemExit(f"expected the workload's rows at {path}, found no file; --data_root "
                         f"names the folder that has it")
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        if "messages" in row:
            row["prompt"] = "".join(f"{m['role']}: {m['content']}\n" for m in row["messages"])
        yield row


def tokenized(texts: Sequence[dict[str, str]], parts: Sequence[str], vocab_size: int) -> Rows:
    """Token ids by a byte-pair tokenizer made from these texts; all but the prompt end with 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator((text[part] for text in texts for part in parts),
                             trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                                 special_tokens=["<pad>", "<s>", "</s>"]))
    return [{part: made.encode(text[part]).ids + ([] if part == "prompt" else [2])
             for part in parts} for text in texts]


def random_rows(workload: dict[str, Any]) -> Rows:
    """Rows of a workload without data: lengths from 1 to half of `max_tokens` each."""
    rng, half = random.Random(workload["seed"]), workload["max_tokens"] // 2
    return [{part: [rng.randrange(3, workload["model"]["vocab_size"])
                    for _ in range(rng.randint(1, half))] for part in PARTS[workload["task"]]}
            for _ in range(workload["batch_size"] * workload["num_steps"])]


def make_rows(workload: dict[str, Any], data_root: Path) -> Rows:
    """As many rows as the steps need, none longer than `max_tokens`.

    Raises:
        SystemExit: when the file has fewer.
    """
    if workload["data"] is None:
        return random_rows(workload)
    parts = PARTS[workload["task"]]
    rows = tokenized(list(read_texts(data_root / workload["data"])), parts,
                     workload["model"]["vocab_size"])
    fitting = [row for row in rows if all(0 < len(row[part]) for part in parts) and all(
        len(row["prompt"]) + len(row[part]) <= workload["max_tokens"] for part in parts[1:])]
    needed = workload["batch_size"] * workload["num_steps"]
    if len(fitting) < needed:
        raise SystemExit(f"{workload['data']}: expected at least {needed} rows of at most "
                         f"{workload['max_tokens']} tokens, got {len(fitting)}")
    random.Random(workload["seed"]).shuffle(fitting)
    return fitting[:needed]


def step_tokens(rows: Rows, workload: dict[str, Any]) -> list[int]:
    """Tokens of each step, without padding."""
    counts = [sum(len(row["prompt"]) + len(row[part]) for part in PARTS[workload["task"]][1:])
              for row in rows]
    size = workload["batch_size"]
    return [sum(counts[i:i + size]) for i in range(0, len(counts), size)]


def measure(path: Path, data_root: Path, peers: Sequence[str], threads: int,
            rounds: int) -> list[Row]:
    """A row for fastrl and for each peer of `peers`."""
    workload = read_workload(path)
    model, task = workload["model"], workload["task"]
    blank = Row(workload=task, case=path.stem, dtype="float32", provider="fastrl",
                status="skipped", reason="not begun", extra={"num_threads": threads},
                sizes={"B": workload["batch_size"], "S": workload["max_tokens"],
                       "V": model["vocab_size"], "D": model["hidden_size"],
                       "L": model["num_layers"]})
    done: dict[str, list[dict[str, Any]]] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        make_models(workload, models)
        examples = make_rows(workload, data_root)
        (models / "rows.json").write_text(json.dumps(examples), "utf-8")
        present = ["fastrl", *(p for p in peers if interpreter(p) is not None)]
        for _ in range(rounds):
            for provider in present:
                done.setdefault(provider, []).append(
                    run(provider, path, models, threads, task=task))
    tokens = step_tokens(examples, workload)
    for provider in ("fastrl", *peers):
        row = Row(**{**vars(blank), "provider": provider})
        if provider not in done:
            rows.append(row.without_figure("unavailable", "no environment: make peers"))
            continue
        gap = abs(done[provider][0]["losses"][0] - done["fastrl"][0]["losses"][0])
        if not gap <= TOLERANCE:
            rows.append(row.without_figure(
                "wrong", f"loss of the first batch differs from fastrl's by {gap:.2e}"))
            continue
        extra = {**row.extra, **figures(done[provider], done["fastrl"], tokens)}
        seconds = [s for one in done[provider] for s in one["seconds"][1:]]
        peak = max(one["peak_bytes_above_imports"] for one in done[provider])
        rows.append(Row(**{**vars(row), "extra": extra}).timed(
            Timing("clock", seconds), peak, None, None))
    return rows


def figures(done: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]],
            tokens: Sequence[int]) -> dict[str, Any]:
    """The extras of a row; ratios are times over fastrl's, so that above 1 fastrl is faster."""
    def total(runs: Sequence[dict[str, Any]], name: str) -> float:
        return sum(sum(one[name][1:]) for one in runs) / len(runs)

    losses = zip(done[0]["losses"], own[0]["losses"], strict=True)
    return {
        "tokens_per_s": round(sum(tokens[1:]) / total(done, "seconds"), 1), "tokens": list(tokens),
        "processor_s": total(done, "processor_s"),
        "ratio": round(total(done, "seconds") / total(own, "seconds"), 2),
        "processor_ratio": round(total(done, "processor_s") / total(own, "processor_s"), 2),
        "losses": done[0]["losses"], "loss_gaps": [abs(a - b) for a, b in losses],
        "peak_bytes_of_process": max(one["peak_bytes"] for one in done),
        "peer_versions": done[0]["versions"], "load": os.getloadavg()[0]}


def main() -> int:
    """Measure and write a result file for each workload; 1 where a loss differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["sft_cpu", "reward_cpu"],
                        help="files of benchmarks/workloads, without .yaml")
    parser.add_argument("--data_root", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--peers", nargs="*", default=["trl"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each provider")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    is_wrong = False
    for name in options.workloads:
        path = ROOT / "benchmarks/workloads" / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.yaml"))
            raise SystemExit(f"--workloads: expected some of {', '.join(known)}, got {name!r}")
        task = read_workload(path).get("task")
        if task not in PARTS:
            raise SystemExit(f"{path}: expected a task of {', '.join(PARTS)}, got {task!r}")
        document = head(task, "cpu", None, None)
        rows = measure(path, options.data_root, options.peers, options.threads, options.rounds)
        for row in rows:
            print(row.workload, row.provider, row.status, row.reason, row.median_s, row.extra,
                  flush=True)
        save(document, rows, options.out / file_name(task, "cpu"))
        is_wrong |= any(row.status == "wrong" for row in rows)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
