"""Tokens per second of the engine beside `transformers.generate`, sampling at temperature 1.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.bench_generate --threads 1 2

A random llama of 15 million parameters, 64 prompts of 64 tokens, nothing stops a response early.
equal: 64 tokens each. mixed: 8 to 256 tokens, evenly spread and shuffled; transformers generates
256 for all, and only the tokens that were asked for count. Both run in turns in one process, so
that another load on the machine meets both; a ratio is that of one turn. The clock counts what
others take of the processors, processor time does not, but all threads together.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.results import Row, file_name, head, save
from benchmarks.timing import Timing
from fastrl.config import SamplingConfig
from fastrl.engine import Engine
from fastrl.models import load_causal_lm

SIZES = {"B": 64, "P": 64, "V": 32000, "D": 288, "L": 6}
"""Prompts and tokens of each; vocabulary, width and layers of the model."""
EQUAL_TOKENS, MIXED_TOKENS = 64, (8, 256)
ROUNDS = {"equal": 5, "mixed": 3}


def make_checkpoint(path: Path) -> None:
    """A folder with the model, random weights."""
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=SIZES["V"], hidden_size=SIZES["D"], intermediate_size=768,
        num_hidden_layers=SIZES["L"], num_attention_heads=6, max_position_embeddings=512,
        tie_word_embeddings=True)).save_pretrained(path)


def prompts() -> list[list[int]]:
    """Random token ids, the same at every call."""
    rng = random.Random(0)
    return [[rng.randrange(SIZES["V"]) for _ in range(SIZES["P"])] for _ in range(SIZES["B"])]


def wanted_tokens(case: str) -> list[int]:
    """Tokens that each request asks for."""
    if case == "equal":
        return [EQUAL_TOKENS] * SIZES["B"]
    low, high = MIXED_TOKENS
    spread = [low + round(i * (high - low) / (SIZES["B"] - 1)) for i in range(SIZES["B"])]
    random.Random(0).shuffle(spread)
    return spread


def fastrl_call(path: Path, wanted: list[int]) -> Callable[[], None]:
    """A call that generates what is wanted with the engine."""
    engine = Engine(load_causal_lm(path))
    sampling = [SamplingConfig(max_new_tokens=n, stop_token_ids=()) for n in wanted]

    def call() -> None:
        assert engine.generate(prompts(), sampling).response_lens.tolist() == wanted

    return call


def transformers_call(path: Path, wanted: list[int]) -> Callable[[], None]:
    """A call that generates as many tokens as anyone wants, for all."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    token_ids = torch.tensor(prompts())

    def call() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), do_sample=True, top_k=0,
                max_new_tokens=max(wanted), pad_token_id=0, eos_token_id=None)
        assert out.shape[1] == SIZES["P"] + max(wanted)

    return call


def measure(path: Path, case: str, num_threads: int) -> list[Row]:
    """A row for each of the two, by the clock; processor time and ratios are among the extras."""
    torch.set_num_threads(num_threads)
    wanted = wanted_tokens(case)
    calls = {"fastrl": fastrl_call(path, wanted), "transformers": transformers_call(path, wanted)}
    clock: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, ROUNDS[case]):
        for name, call in calls.items():
            begin, used = time.perf_counter(), time.process_time()
            call()
            if turn >= 0:  # the first is for warming up
                clock[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - used)
    rows = []
    for name in calls:
        extra = {
            "num_threads": num_threads, "tokens": sum(wanted), "load": os.getloadavg()[0],
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "tokens_per_s": round(sum(wanted) / statistics.median(clock[name])),
            "processor_s": statistics.median(processor[name]),
        }
        for kind, seconds in (("ratio", clock), ("processor_ratio", processor)):
            turns = [b / a for a, b in zip(seconds[name], seconds["transformers"], strict=True)]
            extra[kind] = round(statistics.median(turns), 2)
            extra[f"{kind}s"] = [round(ratio, 2) for ratio in turns]
        row = Row(workload="generate", case=case, sizes=SIZES, dtype="float32", provider=name,
                  status="checked", reason="not timed yet", extra=extra)
        rows.append(row.timed(Timing("clock", clock[name]), None, None, None))
    return rows


def main() -> int:
    """Measure every case and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_generate",
                                     description=__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--cases", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    document, rows = head("generate", "cpu", None, None), []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        for num_threads in options.threads:
            for case in options.cases:
                rows += measure(Path(folder), case, num_threads)
                for row in rows[-2:]:
                    print(case, num_threads, row.provider, row.extra, flush=True)
    save(document, rows, options.out / file_name("generate", "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
