"""The native families: transformers' class names, and new decoders by family."""

from fastrl.errors import ModelError
from fastrl.models.config import DecoderConfig, FamilyName
from fastrl.models.read_config import read_config

CAUSAL_CLASSES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}
SCALAR_CLASSES: dict[str, str] = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
}


def decoder_config(
    family: FamilyName, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int,
    max_positions: int, num_kv_heads: int | None = None, intermediate_size: int | None = None,
    tie_embeddings: bool = True, bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (), pad_token_id: int | None = None,
) -> DecoderConfig:
    """A new decoder of a family, with the family's own switches.

    Args:
        num_kv_heads: None takes num_heads; gpt2 and gpt_neox have no other choice.
        intermediate_size: None takes 8/3 of hidden_size, rounded up to a multiple of 8.
    Raises:
        ModelError: when the sizes do not fit together or do not exist in the family.
    """
    kv_heads = num_kv_heads or num_heads
    inner = intermediate_size or -(-hidden_size * 8 // 24) * 8
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size: expected a multiple of num_heads ({num_heads}), got "
                         f"{hidden_size}; change one of them")
    if family in ("gpt2", "gpt_neox") and kv_heads != num_heads:
        raise ModelError(f"num_kv_heads: expected {num_heads} (num_heads) in the family {family}, "
                         f"got {kv_heads}; leave it out")
    ids = {"bos_token_id": bos_token_id, "eos_token_id": list(eos_token_ids),
           "pad_token_id": pad_token_id}
    shape = {"model_type": family, "vocab_size": vocab_size, "tie_word_embeddings": tie_embeddings}
    if family == "gpt2":
        return read_config(shape | ids | {
            "n_embd": hidden_size, "n_layer": num_layers, "n_head": num_heads, "n_inner": inner,
            "n_positions": max_positions})
    return read_config(shape | ids | {
        "hidden_size": hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "max_position_embeddings": max_positions,
        "head_dim": hidden_size // num_heads, "sliding_window": None})
