"""sample_tokens on a GPU: a row per block, masses as integers; see csrc/sampling.cu.

    token = first v with mass_0 + ... + mass_v > u sum(mass)

Limits: float32, float16, bfloat16 logits of at most 2^20 columns; logits whose neighbours in a row
are not neighbours in memory are copied first.
"""

import torch
from torch import Tensor

from fastrl_kernels.cuda import compiled_ops, stream_of
from fastrl_kernels.cuda.gae import supports

__all__ = ["sample_fwd", "sample_tokens", "supports"]


def sample_fwd(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
    repetition_penalty: Tensor | None, seen: Tensor | None, stop_token_ids: Tensor | None,
    suppresses_stops: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch: token ids, log-probs, entropy and whether the token is a stop, [B] each."""
    num_rows = len(logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    columns = [None if x is None else x.contiguous() for x in (
        seeds, positions, temperature.float(), top_k, top_p.float(), min_p.float(), greedy,
        raw_logprobs, None if repetition_penalty is None else repetition_penalty.float(), seen,
        stop_token_ids, suppresses_stops)]
    result = (logits.new_empty(num_rows, dtype=torch.int64),
              logits.new_empty(num_rows, dtype=torch.float32),
              logits.new_empty(num_rows, dtype=torch.float32),
              logits.new_empty(num_rows, dtype=torch.bool))
    compiled_ops().sample_tokens(logits, *columns, *result, stream_of(logits))
    return result


# What a compiled graph holds; eager code calls sample_fwd, which costs the host less.
@torch.library.custom_op("fastrl_cuda::sampled_tokens", mutates_args=())
def _sampled_tokens(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
    repetition_penalty: Tensor | None, seen: Tensor | None, stop_token_ids: Tensor | None,
    suppresses_stops: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sample_fwd(logits, seeds, positions, temperature, top_k, top_p, min_p, greedy,
                      raw_logprobs, repetition_penalty, seen, stop_token_ids, suppresses_stops)


@_sampled_tokens.register_fake
def _(logits: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    num_rows = logits.shape[0]
    return (logits.new_empty(num_rows, dtype=torch.int64),
            logits.new_empty(num_rows, dtype=torch.float32),
            logits.new_empty(num_rows, dtype=torch.float32),
            logits.new_empty(num_rows, dtype=torch.bool))


def sample_tokens(*arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fastrl.ops.sample_tokens on this backend; the arguments of `sample_fwd`."""
    run = _sampled_tokens if torch.compiler.is_compiling() else sample_fwd
    return run(*arguments)  # type: ignore[arg-type]
