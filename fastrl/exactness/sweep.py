"""The start-up sweep: does a row have the same bits on every path, for the shapes of this model?

Each line of the result is one kind of work on one shape: the rows are computed among many and among
few, or by the path of the engine and by that of the update, and compared bit by bit.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastrl.exactness.attention import AttentionPaths
from fastrl.exactness.rows import (
    Product,
    choose_products,
    invariant_rows,
    least_rows,
    products,
    products_of_kernel,
    row_multiple,
)
from fastrl.exactness.settings import exact_math
from fastrl.models import CausalLM
from fastrl.models.decoder import Decoder, DecoderLayer
from fastrl.models.heads import project_logits
from fastrl.ops import (
    linear_logprobs,
    qk_norm_rotary,
    rotary,
    rotary_write_kv,
    sample_tokens,
)

logger = logging.getLogger("fastrl")

MAX_SECONDS = 20.0
"""No line is begun after so long; those left are reported as not tried."""
LOGPROB_TOLERANCE = 1e-5
"""Between the log-probs of sampler and loss, whose float32 sums over the vocabulary may differ."""
OWN_KERNEL = "linear in triton, whose rows do not"
RECOMPUTED = "old log-probs are recomputed where they differ"


@dataclass(frozen=True, slots=True)
class SweepLine:
    """One kind of work on one shape."""

    work: str
    shape: str
    result: str
    """What was found."""
    used: str
    """What exact mode does about it."""
    is_exact: bool
    """False: something fails and nothing passes in its place."""


@torch.no_grad()
def sweep(model: CausalLM, max_seconds: float = MAX_SECONDS) -> list[SweepLine]:
    """Try every matrix, row kernel, attention shape and the LM head of a model.

    Args:
        model: Where it will run, in the dtype that it will have.
        max_seconds: Begin no further line after so long.
    """
    begin, lines = time.monotonic(), list[SweepLine]()
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(0)
    with exact_math(device.type):
        choose_products(model)
        for shape, run in _works(model, generator):
            if time.monotonic() - begin > max_seconds:
                lines.append(SweepLine("not tried", shape, f"more than {max_seconds:g} s",
                                       RECOMPUTED, False))
            else:
                lines.append(run())
    return lines


def warn_of_failures(model: CausalLM) -> None:
    """Sweep at start-up: a warning for whatever is not exact; what the products need is cached."""
    for line in sweep(model):
        if not line.is_exact:
            logger.warning("exact mode: %s, %s: %s; %s (fastrl doctor --exact shows all)",
                           line.work, line.shape, line.result, line.used)


def _works(
    model: CausalLM, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], SweepLine]]]:
    """(shape, what makes its line) of everything that is tried."""
    weight = model.lm_head.weight
    by_kernel = products_of_kernel(model)
    for product in products(model):
        yield product.shape, partial(_product, product, weight, product in by_kernel)
    backbone = model.backbone
    if isinstance(backbone, Decoder):
        layer = backbone.layers[0]
        assert isinstance(layer, DecoderLayer)
        rows = _row_counts(model)
        yield "norm", lambda: _row_kernel("norm", model, layer.attention_norm, rows, generator)
        yield "mlp", lambda: _row_kernel("mlp", model, layer.mlp, rows, generator)
        if backbone.rotary is not None:
            yield "rotary", lambda: _rotary(backbone, weight, rows[-1], generator)
        paths = AttentionPaths(backbone.config, weight, generator)
        yield "attention", lambda: _attention(paths)
        yield "prefixes", lambda: _shared_prompts(paths)
    yield "LM head", lambda: _lm_head(model, generator)


def _row_counts(model: CausalLM) -> list[int]:
    """Rows that passes of the engine can have: few, and none that it would pad."""
    unit, least = row_multiple(model), invariant_rows(model)
    first = -(-least // unit) * unit
    return [first, first + unit, 3 * first]


def _product(product: Product, like: Tensor, takes_kernel: bool) -> SweepLine:
    """From how many rows on `x @ weight.T` has the same bits."""
    least = least_rows(product, like.dtype, like.device)
    work = "logits" if product.is_head else "product"
    if least is None:
        return SweepLine(work, product.shape, "rows depend on the number of rows",
                         OWN_KERNEL if takes_kernel else RECOMPUTED, takes_kernel)
    used = "nothing to do" if least == 1 else f"passes padded to {least} rows"
    return SweepLine(work, product.shape, f"equal from {least} rows on", used, True)


def _row_kernel(
    name: str, model: CausalLM, module: torch.nn.Module, counts: list[int],
    generator: torch.Generator,
) -> SweepLine:
    """A module that treats every row alone, among few rows and among many."""
    most = 8 * counts[-1]
    width = model.spec.hidden_size
    x = _random((most, width), model.lm_head.weight, generator)
    inputs = (x, x.flip(0)) if name == "norm" else (x,)

    def run(rows: slice) -> Tensor:
        output = module(*(value[rows] for value in inputs))
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    many = run(slice(None))
    different = [count for count in counts if not torch.equal(run(slice(count)), many[:count])]
    result = "equal" if not different else f"other bits with {different} rows"
    used = "nothing to do" if not different else RECOMPUTED
    return SweepLine(name, f"rows of {width}", result, used, not different)


def _rotary(
    backbone: Decoder, like: Tensor, num_rows: int, generator: torch.Generator
) -> SweepLine:
    """Turned queries and keys of training, and those that the engine writes into pages."""
    config, layer = backbone.config, backbone.layers[0]
    assert backbone.rotary is not None and isinstance(layer, DecoderLayer)
    shape = (num_rows, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
    heads = _random(shape, like, generator)
    cos, sin = backbone.rotary(torch.arange(num_rows, device=like.device), like.dtype)
    query, key, value = torch.split(
        heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
    norms, epsilon = (layer.attention.q_norm, layer.attention.k_norm), config.norm_epsilon
    weights = [norm.weight for norm in norms if norm is not None]
    if weights:
        query, key = qk_norm_rotary(query, key, weights[0], weights[1], cos, sin, epsilon=epsilon)
    else:
        query, key = rotary(query, key, cos, sin)
    pages = torch.zeros(1, 1, 2, num_rows, *key.shape[1:], dtype=like.dtype, device=like.device)
    turned = rotary_write_kv(
        heads, pages, 0, torch.arange(num_rows, device=like.device), cos=cos, sin=sin,
        q_weight=weights[0] if weights else None, k_weight=weights[1] if weights else None,
        epsilon=epsilon)
    is_exact = all(map(torch.equal, (turned, pages[0, 0, 0], pages[0, 0, 1]), (query, key, value)))
    return SweepLine(
        "rotary", f"{shape[1]} heads of {config.head_dim}",
        "packed = written into pages" if is_exact else "other bits where pages are written",
        "nothing to do" if is_exact else RECOMPUTED, is_exact)


def _attention(paths: AttentionPaths) -> SweepLine:
    """Packed sequences, the same as prompts in pages, and their last tokens as decode steps."""
    return _compared("attention", paths.shape, "packed = prompt = decode step",
                     paths.different_in_pages())


def _shared_prompts(paths: AttentionPaths) -> SweepLine:
    """A prompt encoded once for several sequences, and read once for their decode steps."""
    return _compared("prefixes", paths.shape, "packed = encoded = read once",
                     paths.different_when_shared())


def _compared(work: str, shape: str, equal: str, different: list[str]) -> SweepLine:
    if different:
        return SweepLine(work, shape, f"other bits than packed: {', '.join(different)}",
                         RECOMPUTED, False)
    return SweepLine(work, shape, equal, "nothing to do", True)


def _lm_head(model: CausalLM, generator: torch.Generator) -> SweepLine:
    """The sampler's log-prob of a few rows beside the loss's of many."""
    weight = model.lm_head.weight
    few, most = _row_counts(model)[0], 8 * _row_counts(model)[-1]
    hidden = _random((most, weight.shape[1]), weight, generator)
    logits = model.lm_head(hidden[:few], project_logits)
    ones = torch.ones(few, device=weight.device)
    zeros = torch.zeros(few, dtype=torch.int64, device=weight.device)
    drawn = sample_tokens(
        logits, zeros, torch.arange(few, device=weight.device), temperature=ones, top_k=zeros,
        top_p=ones, min_p=0 * ones, greedy=zeros.bool(), raw_logprobs=zeros.bool(),
        is_truncated=False)
    token_ids = drawn.token_ids.new_zeros(most)
    token_ids[:few] = drawn.token_ids
    again, _ = model.lm_head(hidden, linear_logprobs, token_ids)
    gap = float((again[:few].float() - drawn.logprobs).abs().max())
    is_exact = gap <= LOGPROB_TOLERANCE
    used = "nothing to do" if is_exact else RECOMPUTED
    return SweepLine("LM head", f"{weight.shape[0]} x {weight.shape[1]}",
                     f"sampler and loss differ by {gap:.1e}", used, is_exact)


def _random(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator, device=like.device) - 0.5).to(like.dtype)
