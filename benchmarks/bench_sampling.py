"""sample_tokens of a decode step: plain, and with every truncation."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, disagreement
from fastrl.ops import sample_tokens
from fastrl.ops.sampling import sample_tokens_reference


def inputs(B: int, V: int, dtype: torch.dtype, truncated: bool) -> Inputs:
    top_k, top_p, min_p = (50, 0.9, 0.01) if truncated else (0, 1.0, 0.0)
    off = torch.zeros(B, dtype=torch.bool)
    return {"logits": 3 * torch.randn(B, V, dtype=dtype), "seeds": torch.randint(2**40, (B,)),
            "positions": torch.arange(B), "temperature": torch.ones(B),
            "top_k": torch.full((B,), top_k), "top_p": torch.full((B,), top_p),
            "min_p": torch.full((B,), min_p), "greedy": off, "raw_logprobs": off}


def agree(results: list[Tensor], truth: list[Tensor], plain: list[Tensor], floor: float
          ) -> str | None:
    """Tokens are equal but where a rounded sum decides; log-probs and entropies where they are."""
    same = results[0] == truth[0]
    if same.double().mean() < 0.95:
        return f"{int((~same).sum())} of {len(same)} tokens differ"
    same &= plain[0] == truth[0]
    return disagreement(*([x[same] for x in outputs[1:3]] for outputs in (results, truth, plain)),
                        floor)


# Told by the caller that no row truncates, a kernel leaves a search out.
UNTRUNCATED = {f"{backend}_untruncated":
               partial(sample_tokens, backend=backend, is_truncated=False)
               for backend in ("triton", "cuda")}
CASES = [
    Case(op=sample_tokens, name="truncated" if truncated else "plain",
         reference=sample_tokens_reference, inputs=partial(inputs, truncated=truncated),
         run=lambda op, **given: op(**given), agree=agree,
         cpu={"B": 64, "V": 32000}, gpu={"B": 256, "V": 151936}, small={"B": 5, "V": 301},
         gpu_dtype=torch.bfloat16, bytes_moved=lambda B, V, dtype: B * V * dtype.itemsize,
         others={} if truncated else UNTRUNCATED)
    for truncated in (False, True)
]
