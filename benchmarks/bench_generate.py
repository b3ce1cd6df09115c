"""Tokens per second of the engine beside `transformers.generate`, sampling at temperature 1.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.bench_generate --threads 1 2

A random llama of 15 million parameters, 64 prompts of 64 tokens, nothing stops a response early.
equal: 64 tokens each. mixed: 8 to 256 tokens, evenly spread and shuffled; transformers generates
256 for all, and only the tokens that were asked for count. Each runs as its user would run it:
the engine with its defaults, transformers with the fastest of the attentions and caches that it
offers (VARIANTS), found by trying before anything is timed; transformers_plain is `generate` as it
comes, without a word on attention or cache. They run in turns in one process, so that another load
on the machine meets all; a ratio is that of one turn. The clock counts what others take of the
processors, processor time does not, but all threads together. fastrl_free is the engine with
`exact=False`: its log-probs may differ from the update's in the last bits. Ratios are to
transformers at its fastest, `..._to_transformers_plain` to the other. Ten minutes on two idle cores
for both numbers of threads.
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
from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.models import load_causal_lm

SIZES = {"B": 64, "P": 64, "V": 32000, "D": 288, "L": 6}
"""Prompts and tokens of each; vocabulary, width and layers of the model."""
EQUAL_TOKENS, MIXED_TOKENS = 64, (8, 256)
ROUNDS = {"equal": 5, "mixed": 2}
GOALS = {"equal": 2.0, "mixed": 3.0}
"""Times transformers' tokens per second, by the clock on an idle machine."""
VARIANTS = {"sdpa": ("sdpa", None), "eager": ("eager", None), "sdpa_static": ("sdpa", "static")}
"""transformers: attention and, where it is not the one that grows, kind of cache."""
PLAIN = "plain"
"""transformers as it comes: attention and cache are left to it."""
TRIAL_TOKENS = 24


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


def fastrl_call(path: Path, wanted: list[int], *, exact: bool) -> Callable[[], None]:
    """A call that generates what is wanted with the engine."""
    engine = Engine(load_causal_lm(path), EngineConfig(exact=exact))
    sampling = [SamplingConfig(max_new_tokens=n, stop_token_ids=()) for n in wanted]

    def call() -> None:
        assert engine.generate(prompts(), sampling).response_lens.tolist() == wanted

    return call


def transformers_call(path: Path, wanted: list[int], variant: str) -> Callable[[], None]:
    """A call that generates as many tokens as anyone wants, for all."""
    import transformers

    attention, cache = (None, None) if variant == PLAIN else VARIANTS[variant]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation=attention).eval()
    token_ids = torch.tensor(prompts())

    def call() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), do_sample=True, top_k=0,
                max_new_tokens=max(wanted), pad_token_id=0, eos_token_id=None,
                cache_implementation=cache)
        assert out.shape[1] == SIZES["P"] + max(wanted)

    return call


def processor_seconds(call: Callable[[], None]) -> float:
    """Processor time of a call, all threads together."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def fastest_variant(path: Path, num_threads: int) -> tuple[str, dict[str, float]]:
    """The variant of transformers that takes the least processor time, and that of each."""
    torch.set_num_threads(num_threads)
    calls = {variant: transformers_call(path, [TRIAL_TOKENS] * SIZES["B"], variant)
             for variant in VARIANTS}
    seconds = {variant: min(processor_seconds(call) for _ in range(2))
               for variant, call in calls.items()}
    return min(seconds, key=seconds.__getitem__), seconds


def measure(path: Path, case: str, num_threads: int, variant: str) -> list[Row]:
    """A row for each of them, by the clock; processor time and ratios are among the extras."""
    torch.set_num_threads(num_threads)
    wanted = wanted_tokens(case)
    calls = {"fastrl": fastrl_call(path, wanted, exact=True),
             "fastrl_free": fastrl_call(path, wanted, exact=False),
             "transformers": transformers_call(path, wanted, variant),
             "transformers_plain": transformers_call(path, wanted, PLAIN)}
    clock: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, ROUNDS[case]):
        for name, call in calls.items():
            begin = time.perf_counter()
            used = processor_seconds(call)
            if turn >= 0:  # the first is for warming up
                clock[name].append(time.perf_counter() - begin)
                processor[name].append(used)
    rows = []
    for name in calls:
        extra = {
            "num_threads": num_threads, "tokens": sum(wanted), "load": os.getloadavg()[0],
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "tokens_per_s": round(sum(wanted) / statistics.median(clock[name])),
            "processor_s": statistics.median(processor[name]),
        }
        for kind, seconds in (("ratio", clock), ("processor_ratio", processor)):
            for peer, suffix in (("transformers", ""),
                                 ("transformers_plain", "_to_transformers_plain")):
                turns = [b / a for a, b in zip(seconds[name], seconds[peer], strict=True)]
                extra[kind + suffix] = round(statistics.median(turns), 2)
                extra[f"{kind}s{suffix}"] = [round(ratio, 2) for ratio in turns]
        if name.startswith("transformers"):
            extra["variant"] = variant if name == "transformers" else PLAIN
        row = Row(workload="generate", case=case, sizes=SIZES, dtype="float32", provider=name,
                  status="checked", reason="not timed yet", extra=extra)
        rows.append(row.timed(Timing("clock", clock[name]), None, None, None))
    return rows


def summary(row: Row) -> str:
    """One line: what came out beside the goal."""
    extra = row.extra
    threads = "1 thread" if extra["num_threads"] == 1 else f"{extra['num_threads']} threads"
    return (f"{row.case}, {threads}, {row.provider}: {extra['tokens_per_s']} tokens/s, "
            f"{extra['ratio']} times transformers by the clock, {extra['processor_ratio']} by "
            f"processor time (goal {GOALS[row.case]}); {extra['ratio_to_transformers_plain']} and "
            f"{extra['processor_ratio_to_transformers_plain']} times {PLAIN} transformers")


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
            variant, seconds = fastest_variant(Path(folder), num_threads)
            print(f"transformers, {num_threads}: {variant} of",
                  {name: round(each, 2) for name, each in seconds.items()}, flush=True)
            for case in options.cases:
                rows += measure(Path(folder), case, num_threads, variant)
                print(*map(summary, rows[-4:]), sep="\n", flush=True)
    save(document, rows, options.out / file_name("generate", "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
