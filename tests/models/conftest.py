"""Random transformers checkpoints of odd sizes, and logits by both roads."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.models import CausalLM, PackedAttention
from fastrl.packing import pack_sequences

# Odd on purpose: 5 heads over one KV head, a width and a vocabulary no block size divides.
SIZES = dict(vocab_size=97, hidden_size=40, intermediate_size=52, num_hidden_layers=3,
             num_attention_heads=5, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
GQA = SIZES | dict(num_key_value_heads=1)
LLAMA3 = dict(rope_type="llama3", rope_theta=1000.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA | dict(attention_bias=True, mlp_bias=True)),
    "llama_tied": ("LlamaConfig", GQA | dict(tie_word_embeddings=True)),
    "llama_linear": ("LlamaConfig", GQA | dict(
        rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0))),
    "llama_llama3": ("LlamaConfig", GQA | dict(rope_parameters=LLAMA3)),
    "mistral": ("MistralConfig", GQA | dict(sliding_window=3)),
    "mistral_full": ("MistralConfig", GQA | dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", GQA),
    "qwen2_window": ("Qwen2Config", GQA | dict(use_sliding_window=True, sliding_window=2,
                                               max_window_layers=1)),
    "qwen3": ("Qwen3Config", GQA | dict(head_dim=14)),
    "gpt2": ("GPT2Config", dict(vocab_size=97, n_embd=40, n_inner=52, n_layer=3, n_head=5,
                                n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "gpt2_untied": ("GPT2Config", dict(vocab_size=97, n_embd=40, n_layer=3, n_head=5,
                                       n_positions=64, bos_token_id=1, eos_token_id=2,
                                       tie_word_embeddings=False)),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt_neox_serial": ("GPTNeoXConfig", SIZES | dict(
        use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5))),
    "phi3": ("Phi3Config", GQA | dict(sliding_window=3)),
    "opt": ("OPTConfig", dict(vocab_size=97, hidden_size=40, ffn_dim=52, num_hidden_layers=3,
                              num_attention_heads=5, max_position_embeddings=64, init_std=0.3,
                              word_embed_proj_dim=40)),
}
SEQUENCES = ((5, 7, 96, 9, 33, 3, 8, 90, 4), (4, 95, 3), (11,), (17, 18, 19, 20, 21))


def _randomize(model: torch.nn.Module) -> None:
    """Large weights, and biases and norms away from 0 and 1: every tensor must matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SimpleNamespace]:
    """`checkpoint(name, head="CausalLM", **changes)`: a transformers model and its folder."""
    import transformers

    made: dict[str, SimpleNamespace] = {}

    def make(name: str, head: str = "CausalLM", **changes: Any) -> SimpleNamespace:
        key = f"{name} {head} {sorted(changes.items())}"
        if key not in made:
            class_name, settings = CHECKPOINTS[name]
            config = getattr(transformers, class_name)(**(settings | changes))
            model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
            _randomize(model)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[key] = SimpleNamespace(model=model, folder=folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def logits() -> SimpleNamespace:
    """`packed(model)` by fastrl and `separate(transformers_model)` one sequence at a time."""

    def packed(model: CausalLM, sequences: Any = SEQUENCES) -> Tensor:
        batch = pack_sequences(sequences)
        attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
        return model.lm_head(model(batch.token_ids, batch.positions, attention), F.linear)

    def separate(model: Any, sequences: Any = SEQUENCES) -> Tensor:
        return torch.cat([model(input_ids=torch.tensor([s]), use_cache=False).logits[0]
                          for s in sequences])

    def reload(folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder).eval()

    return SimpleNamespace(packed=packed, separate=separate, reload=reload)
