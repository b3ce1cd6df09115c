"""`python -m benchmarks engine`: output tokens per second of whole generations, beside peers.

Random weights made on the device; nothing stops a response early. equal: every response has T
tokens; mixed: T/16 to T, evenly spread. A provider is called once to warm up, which compiles and
captures, and then timed. The floor is that of the decode steps: weights once a step, the cached
tokens of every sequence (the prompt's once for all its samples), its logits; or the products, where
they take longer.
"""

import gc
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.ceilings import Ceilings, assumed_ceilings, measured_ceilings
from benchmarks.engine_providers import PROVIDERS, Call, Setting
from benchmarks.engine_workloads import (
    MODELS,
    SMALL,
    Workload,
    floor,
    memory,
    random_model,
    workloads,
)
from benchmarks.results import Row, head, save
from benchmarks.timing import Timing, peak_bytes
from fastrl.config import SamplingConfig
from fastrl.engine import Engine
from fastrl.models import PackedAttention
from fastrl.models.scoring import response_logprobs
from fastrl.packing import pack_sequences

MEMORY_SHARE = 0.9
"""Of the free memory, what weights and cache of a provider may take."""
CHECKED_PROMPTS = ((3, 9, 4, 1, 5), (7,), tuple(range(20, 43)))
MAX_LOGPROB_GAP = 0.1
"""Between bfloat16's own log-probs and those of a packed pass; rounding costs 0.03 to 0.06."""


@torch.no_grad()
def check(device: str) -> str:
    """What is wrong with the engine on this device; empty where its tokens are right.

    Tokens in float32 against a loop that keeps nothing; in the dtype that is timed, log-probs
    against a packed pass.
    """
    model = random_model(SMALL, torch.float32, device)
    sampling = SamplingConfig(max_new_tokens=20, greedy=True, stop_token_ids=())
    rollout = Engine(model).generate(CHECKED_PROMPTS, sampling)
    for row, prompt in enumerate(CHECKED_PROMPTS):
        tokens = list(prompt)
        for _ in range(sampling.max_new_tokens):
            packed = pack_sequences([tokens])
            hidden = model(packed.token_ids.to(device), packed.positions.to(device),
                           PackedAttention(packed.cu_seqlens.to(device), packed.max_seqlen))
            tokens.append(int(model.lm_head(hidden[-1:], F.linear).argmax()))
        if rollout.sequence(row) != tokens:
            return f"response {row} is not what a pass over all tokens gives"
    model = random_model(SMALL, torch.bfloat16, device)
    rollout = Engine(model).generate(CHECKED_PROMPTS, SamplingConfig(max_new_tokens=20))
    again, _ = response_logprobs(model, rollout, 1.0, 1024)
    gap = float((again - rollout.rollout_logprobs).abs().max())
    return "" if gap < MAX_LOGPROB_GAP else f"log-probs in bfloat16 are off by {gap:.3g}"


def measure(
    load: Workload, provider: str, device: str, ceilings: Ceilings | None,
    assumed: Ceilings | None, not_begun: tuple[str, str] | None,
) -> Row:
    """A row for one provider on one workload.

    Args:
        not_begun: Status and reason of a row that is not to be measured.
    """
    config = MODELS.get(load.model, SMALL)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bytes_moved, flops = floor(load, config, dtype)
    row = Row(workload=f"generate {load.model}", case=f"{load.lengths} {load.samples} each",
              sizes=load.sizes, dtype=str(dtype).removeprefix("torch."), provider=provider,
              status="skipped", reason="not begun", bytes=bytes_moved, flops=flops)
    if not_begun is not None:
        return row.without_figure(*not_begun)
    package = provider.split("_")[0]
    if importlib.util.find_spec(package) is None:
        return row.without_figure("unavailable", f"package {package} is not installed")
    if provider == "transformers_batch" and device == "cpu":
        return row.without_figure("unavailable", "its cache takes most of a CPU's memory")
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        needed, free = memory(load, config, dtype), torch.cuda.mem_get_info()[0]
        if needed > MEMORY_SHARE * free:
            return row.without_figure("skipped", f"weights and cache take {needed >> 30} GiB, "
                                                 f"{free >> 30} GiB are free")
    extra: dict[str, Any] = {"tokens": load.num_tokens}
    try:
        with PROVIDERS[provider](Setting(load, config, dtype, device, extra)) as call:
            begin = time.perf_counter()
            peak = peak_bytes(call, device)
            extra["first_call_s"] = round(time.perf_counter() - begin, 3)
            seconds = _seconds(call, device)
            extra["tokens_per_s"] = round(load.num_tokens / seconds)
    except Exception as error:  # a row says what was raised, and the next provider runs
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row.without_figure("error", reason)
    timed = row.timed(Timing("clock", [seconds]), peak, ceilings, assumed)
    return replace(timed, extra=extra)


def _seconds(call: Call, device: str) -> float:
    """By the clock, until the device is done."""
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def run_engine(
    device: str, small: bool, providers: Sequence[str], path: Path, deadline: float
) -> list[Row]:
    """Check the engine, then measure every workload until `deadline`; `path` has all rows so far.

    Args:
        deadline: time.monotonic() after which no provider is begun.
    """
    wrong = check(device)
    ceilings = measured_ceilings(device, small)
    assumed = assumed_ceilings(torch.cuda.get_device_name()) if device == "cuda" else None
    document, rows = head("engine", device, ceilings, assumed), []
    for load in workloads(small):
        for provider in providers or PROVIDERS:
            not_begun = None
            if wrong:
                not_begun = "wrong" if provider.startswith("fastrl") else "skipped", wrong
            elif time.monotonic() > deadline:
                not_begun = "skipped", "the time is used up"
            row = measure(load, provider, device, ceilings, assumed, not_begun)
            rows.append(row)
            save(document, rows, path)
            if row.median_s is not None:
                print(row.workload, row.case, row.sizes, provider, row.extra, flush=True)
    return rows
