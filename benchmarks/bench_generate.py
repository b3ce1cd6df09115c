"""Tokens per second of the engine beside `transformers.generate`, sampling at temperature 1.

A random llama of 15 million parameters, 64 prompts of 64 tokens, nothing stops a response early.
equal: 64 tokens each. mixed: 8 to 256 tokens, evenly spread and shuffled; transformers generates
256 for all, and only the tokens that were asked for count. Both run by turns in one process, so
that another load on the machine meets both; the ratio is the median over the turns.
"""

import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastrl.config import SamplingConfig
from fastrl.engine import Engine
from fastrl.models import load_causal_lm

BATCH_SIZE, PROMPT_TOKENS, VOCAB_SIZE = 64, 64, 32000
EQUAL_TOKENS, MIXED_TOKENS = 64, (8, 256)
ROUNDS = {"equal": 7, "mixed": 3}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, random weights."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("15m")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
    )).save_pretrained(path)
    return path


def _prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(BATCH_SIZE)]


def _lengths(lengths: str) -> list[int]:
    """Tokens that each request asks for."""
    if lengths == "equal":
        return [EQUAL_TOKENS] * BATCH_SIZE
    low, high = MIXED_TOKENS
    spread = [low + round(i * (high - low) / (BATCH_SIZE - 1)) for i in range(BATCH_SIZE)]
    random.Random(0).shuffle(spread)
    return spread


def _fastrl(path: Path, lengths: list[int]) -> Callable[[], None]:
    engine, prompts = Engine(load_causal_lm(path)), _prompts()
    sampling = [SamplingConfig(max_new_tokens=n, stop_token_ids=()) for n in lengths]

    def call() -> None:
        assert engine.generate(prompts, sampling).response_lens.tolist() == lengths

    return call


def _transformers(path: Path, lengths: list[int]) -> Callable[[], None]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    token_ids = torch.tensor(_prompts())

    def call() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), do_sample=True, top_k=0,
                max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=None)
        assert out.shape[1] == PROMPT_TOKENS + max(lengths)

    return call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("lengths", ROUNDS)
def test_generate(
    benchmark: BenchmarkFixture, checkpoint: Path, lengths: str, num_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    wanted = _lengths(lengths)
    ours, theirs = _fastrl(checkpoint, wanted), _transformers(checkpoint, wanted)
    ours(), theirs()  # warm up
    seconds: list[float] = []

    def turn_of_transformers() -> None:
        begin = time.perf_counter()
        theirs()
        seconds.append(time.perf_counter() - begin)

    benchmark.pedantic(ours, setup=turn_of_transformers, rounds=ROUNDS[lengths], iterations=1)
    torch.set_num_threads(before)
    if benchmark.stats is None:  # --benchmark-disable
        return
    own_seconds = benchmark.stats.stats.data
    benchmark.extra_info.update(
        tokens=sum(wanted), num_threads=num_threads, torch=torch.__version__,
        transformers=pytest.importorskip("transformers").__version__,
        tokens_per_s=round(sum(wanted) / statistics.median(own_seconds)),
        transformers_tokens_per_s=round(sum(wanted) / statistics.median(seconds)),
        ratios=[round(b / a, 2) for a, b in zip(own_seconds, seconds, strict=True)],
        ratio=round(statistics.median(
            b / a for a, b in zip(own_seconds, seconds, strict=True)), 2),
        load_average=os.getloadavg()[0], omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"))
