"""Tokens per second of the engine beside `transformers.generate`, sampling at temperature 1.

stories260k when the shared folder is there, and a random decoder of 15 million parameters. Mixed
lengths: every response ends by itself with a chance of 1 in 32 per token, which transformers pads.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastrl.config import SamplingConfig
from fastrl.engine import Engine
from fastrl.models import load_causal_lm

STORIES = Path(__file__).resolve().parents[2] / "shared/models/stories260k"
CASES = {"stories260k": (128, 64), "15m": (32, 48)}
"""Responses and tokens of each."""


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a checkpoint, responses, tokens."""
    if request.param == "stories260k":
        if not STORIES.is_dir():
            pytest.skip("needs ../shared (models beside the repository)")
        return STORIES, *CASES[request.param]
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("15m")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
    )).save_pretrained(path)
    return path, *CASES[request.param]


def _prompts(batch_size: int) -> list[list[int]]:
    return [[1, *range(300, 312 + 4 * (i % 4))] for i in range(batch_size)]


def _fastrl(path: Path, batch_size: int, num_tokens: int, mixed: bool) -> Callable[[], int]:
    """A call that generates and returns how many tokens came out."""
    model = load_causal_lm(path)
    engine, prompts = Engine(model), _prompts(batch_size)
    stops = tuple(range(model.spec.vocab_size // 32)) if mixed else ()
    sampling = SamplingConfig(max_new_tokens=num_tokens, stop_token_ids=stops)
    return lambda: int(engine.generate(prompts, sampling).response_mask.sum())


def _transformers(path: Path, batch_size: int, num_tokens: int, mixed: bool) -> Callable[[], int]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    prompts = _prompts(batch_size)
    longest = max(map(len, prompts))
    token_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    stops = list(range(model.config.vocab_size // 32)) if mixed else None
    stop_ids = torch.tensor(stops or [-1])

    def call() -> int:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                token_ids, attention_mask=token_ids != 0, max_new_tokens=num_tokens,
                do_sample=True, top_k=0, pad_token_id=0, eos_token_id=stops)[:, longest:]
        before = torch.isin(out, stop_ids).cumsum(1) - torch.isin(out, stop_ids).int()
        return int((before == 0).sum())

    return call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mixed", [False, True], ids=["equal", "mixed"])
@pytest.mark.parametrize("provider", [_fastrl, _transformers], ids=["fastrl", "transformers"])
def test_generate(benchmark: BenchmarkFixture, provider: Any, case: Any, mixed: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    call = provider(*case, mixed)
    num_tokens = call()
    benchmark.pedantic(call, rounds=3, iterations=1)
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_s"] = round(num_tokens / benchmark.stats.stats.median)
        benchmark.extra_info["torch"] = torch.__version__
