"""Operations: tensors in, tensors out, one file each, with every path of an op in its file."""

from fastrl.ops.activation import gelu, swiglu
from fastrl.ops.adamw import adamw_step
from fastrl.ops.gae import compute_gae
from fastrl.ops.grad_norm import grad_norm
from fastrl.ops.kl import kl_estimate
from fastrl.ops.kv_cache import copy_pages, rotary_write_kv, write_kv
from fastrl.ops.linear import linear
from fastrl.ops.linear_cross_entropy import linear_cross_entropy
from fastrl.ops.linear_kl import linear_kl
from fastrl.ops.linear_logprob import linear_logprobs
from fastrl.ops.linear_policy_loss import linear_policy_loss
from fastrl.ops.logprob import gather_logprobs
from fastrl.ops.masked import masked_mean, masked_sum
from fastrl.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastrl.ops.packed_attention import packed_attention
from fastrl.ops.paged_attention import paged_attention
from fastrl.ops.policy_loss import PolicyStats, policy_loss
from fastrl.ops.ppo_loss import ppo_loss
from fastrl.ops.prefix_attention import prefix_attention
from fastrl.ops.ranking_loss import RankingStats, ranking_loss
from fastrl.ops.rewards import shape_rewards
from fastrl.ops.rotary import qk_norm_rotary, rotary
from fastrl.ops.sampling import SampledTokens, sample_tokens
from fastrl.ops.value_loss import ValueStats, value_loss
from fastrl.ops.whiten import whiten

__all__ = [
    "PolicyStats",
    "RankingStats",
    "SampledTokens",
    "ValueStats",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "compute_gae",
    "copy_pages",
    "gather_logprobs",
    "gelu",
    "grad_norm",
    "kl_estimate",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprobs",
    "linear_policy_loss",
    "masked_mean",
    "masked_sum",
    "packed_attention",
    "paged_attention",
    "policy_loss",
    "ppo_loss",
    "prefix_attention",
    "qk_norm_rotary",
    "ranking_loss",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "sample_tokens",
    "shape_rewards",
    "swiglu",
    "value_loss",
    "whiten",
    "write_kv",
]
