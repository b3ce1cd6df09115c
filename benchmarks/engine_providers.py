"""Who generates in `python -m benchmarks engine`: the engine, and the peers that are installed."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_workloads import Workload, random_model
from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.engine.graphs import refusal
from fastrl.models import DecoderConfig, save_causal_lm

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What a provider is given."""

    load: Workload
    config: DecoderConfig
    dtype: torch.dtype
    device: str
    extra: dict[str, Any]
    """Figures that only this provider has."""


@contextmanager
def fastrl_call(setting: Setting, cuda_graphs: str = "auto") -> Iterator[Call]:
    """A generation by the engine."""
    load, extra = setting.load, setting.extra
    model = random_model(setting.config, setting.dtype, setting.device)
    engine = Engine(model, EngineConfig(
        max_batch_size=load.batch, cuda_graphs=cuda_graphs))  # type: ignore[arg-type]
    sampling = [SamplingConfig(max_new_tokens=n, stop_token_ids=()) for n in load.wanted]
    prompts = load.prompts(setting.config.vocab_size)

    def call() -> None:
        rollout = engine.generate(prompts, sampling, num_samples_per_prompt=load.samples)
        assert int(rollout.response_mask.sum()) == load.num_tokens

    yield call
    if engine._graphs is not None:
        seconds = engine._graphs.capture_s.values()
        extra.update(num_graphs=len(seconds), capture_s=round(sum(seconds), 3))
    elif cuda_graphs == "auto":
        extra["no_graphs"] = refusal(model)
    if setting.device == "cuda":
        extra["waits_per_step"] = round(_num_waits(call) / (max(load.wanted) - 1), 3)


def _num_waits(call: Call) -> int:
    """How often the host waits for the device in a call, beside the events of the flags."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def _transformers_model(setting: Setting) -> Any:
    """The same architecture with random weights of its own."""
    import transformers

    config = setting.config
    kind = {"qwen3": "Qwen3", "llama": "Llama"}[config.family]
    sizes = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim, max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings, eos_token_id=None, bos_token_id=None)
    with torch.device(setting.device):
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(sizes, dtype=setting.dtype)
    return model.eval()


@contextmanager
def transformers_call(setting: Setting) -> Iterator[Call]:
    """`generate`: every response as long as the longest."""
    model, load = _transformers_model(setting), setting.load
    prompts = torch.tensor(load.prompts(setting.config.vocab_size), device=setting.device)

    def call() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                num_return_sequences=load.samples, max_new_tokens=load.new, pad_token_id=0,
                eos_token_id=None)
        assert out.shape == (load.batch, load.prompt + load.new)

    yield call


@contextmanager
def transformers_batch_call(setting: Setting) -> Iterator[Call]:
    """`generate_batch`, its continuous batching: every response as long as the longest."""
    import transformers

    model, load = _transformers_model(setting), setting.load
    prompts = [prompt for prompt in load.prompts(setting.config.vocab_size)
               for _ in range(load.samples)]
    sampling = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=load.new, pad_token_id=0, eos_token_id=-1)

    def call() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate_batch(prompts, generation_config=sampling)
        lengths = {len(result.generated_tokens) for result in out.values()}
        assert len(out) == load.batch and lengths == {load.new}, f"lengths {lengths}"

    yield call


@contextmanager
def vllm_call(setting: Setting) -> Iterator[Call]:
    """vLLM on a folder of the same weights, lengths as asked for."""
    import vllm

    load = setting.load
    with tempfile.TemporaryDirectory() as folder:
        save_causal_lm(random_model(setting.config, setting.dtype, setting.device), Path(folder))
        engine = vllm.LLM(folder, skip_tokenizer_init=True, gpu_memory_utilization=0.8,
                          max_num_seqs=load.batch, max_model_len=load.prompt + load.new)
    sampling = [vllm.SamplingParams(
        temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False, n=load.samples,
        logprobs=0) for n in load.wanted]
    prompts = [{"prompt_token_ids": prompt} for prompt in load.prompts(setting.config.vocab_size)]

    def call() -> None:
        out = engine.generate(prompts, sampling, use_tqdm=False)
        assert sum(len(one.token_ids) for row in out for one in row.outputs) == load.num_tokens

    yield call


PROVIDERS: dict[str, Callable[[Setting], AbstractContextManager[Call]]] = {
    "fastrl": fastrl_call,
    "transformers": transformers_call,
    "transformers_batch": transformers_batch_call,
    "vllm": vllm_call,
    "fastrl_eager": partial(fastrl_call, cuda_graphs="off"),
}
"""In the order in which they are called; the context ends with a look at what was timed."""
