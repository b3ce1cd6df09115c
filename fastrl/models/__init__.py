"""Models: one packed contract, a native decoder family, and transformers for the rest."""

from fastrl.models.attention import Attention, PackedAttention, PagedAttention
from fastrl.models.causal_lm import CausalLM, ScalarModel, scalar_from_causal
from fastrl.models.config import DecoderConfig
from fastrl.models.decoder import Decoder, new_decoder
from fastrl.models.families import decoder_config
from fastrl.models.heads import LMHead, ScalarHead
from fastrl.models.scoring import (
    response_logprobs,
    response_scores,
    response_values,
    sequence_scores,
)
from fastrl.models.spec import ModelSpec, check_tokenizer
from fastrl.models.weights import (
    load_causal_lm,
    load_scalar_model,
    save_causal_lm,
    save_scalar_model,
)

__all__ = [
    "Attention", "CausalLM", "Decoder", "DecoderConfig", "LMHead", "ModelSpec", "PackedAttention",
    "PagedAttention", "ScalarHead", "ScalarModel", "check_tokenizer", "decoder_config",
    "load_causal_lm", "load_scalar_model", "new_decoder", "response_logprobs", "response_scores",
    "response_values", "save_causal_lm", "save_scalar_model", "scalar_from_causal",
    "sequence_scores",
]
