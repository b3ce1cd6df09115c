"""sample_tokens on a GPU: token, log-prob, entropy and stop flag in one launch after the LM head.

    p = softmax(truncate(adjust(logits) / temperature))        u = Philox(seed, position)
    token = first v with p_0 + ... + p_v > u sum(p)

One program per row, which reads it in tiles. Without truncation: one read of the row, which keeps a
sum per tile, and one of the tile that the random number falls into: V elements and a tile. With
top-k or top-p the least logit that is kept is found exactly, on the integer image of a float32
that keeps its order: three thresholds a pass, at most 17 passes each, over a row in the L2 cache.
No sort, no atomics, no host synchronisation, and a row's result depends on that row alone. Limits:
float32, float16, bfloat16 logits; computed in float32, running sums in float64; V up to 2^20.
Source: Salmon et al. 2011 for the random numbers; Holtzman et al. 2020 (arXiv 1904.09751), top-p;
Nguyen et al. 2024 (arXiv 2407.01082), min-p.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.triton.logprob import NEGLIGIBLE, reduce_row
from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "sample_fwd", "sample_tokens", "supports"]

MAX_BLOCK = 4096
MANTISSA_FLIP = tl.constexpr(0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _scores(  # type: ignore[no-untyped-def]
    row_ptr, seen_ptr, stops_ptr, columns, num_columns, stride_v, temperature, penalty, suppresses,
    num_stops, HAS_PENALTY: tl.constexpr, HAS_STOPS: tl.constexpr,
):
    """What is drawn from at `columns`, float32: penalised, stops suppressed, over temperature."""
    is_inside = columns < num_columns
    z = tl.load(row_ptr + columns.to(tl.int64) * stride_v, mask=is_inside,
                other=float("-inf")).to(tl.float32)
    if HAS_PENALTY:
        is_seen = tl.load(seen_ptr + columns, mask=is_inside, other=0) != 0
        z = tl.where(is_seen, tl.where(z > 0, tl.div_rn(z, penalty), z * penalty), z)
    if HAS_STOPS:
        for i in range(num_stops):
            stop = tl.load(stops_ptr + i)
            z = tl.where((columns == stop) & suppresses, float("-inf"), z)
    return tl.div_rn(z, temperature)


@triton.jit
def _order(z):  # type: ignore[no-untyped-def]
    """An int32 that is larger where the float32 is."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ MANTISSA_FLIP)


@triton.jit  # type: ignore[untyped-decorator]
def _least_kept(  # type: ignore[no-untyped-def]
    row_ptr, seen_ptr, stops_ptr, num_columns, stride_v, temperature, penalty, suppresses,
    num_stops, maximum, floor, wanted,
    BY_MASS: tl.constexpr, HAS_PENALTY: tl.constexpr, HAS_STOPS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The largest score t such that what is at least t (and at least floor) amounts to `wanted`.

    The amount is the number of tokens, or with BY_MASS the sum of exp(z - maximum) as a share of
    that of all that are at least floor.
    """
    block = tl.arange(0, BLOCK_V)
    low = tl.full([], -(2**31), tl.int64)  # always amounts to enough
    high = _order(maximum).to(tl.int64) + 1  # never does
    share = wanted
    if BY_MASS:
        sums = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, num_columns, BLOCK_V):
            z = _scores(row_ptr, seen_ptr, stops_ptr, start + block, num_columns, stride_v,
                        temperature, penalty, suppresses, num_stops, HAS_PENALTY, HAS_STOPS)
            sums += tl.where(z >= floor, tl.exp(z - maximum), 0.0)
        share = wanted * tl.sum(sums, axis=0)
    while high - low > 1:
        width = high - low
        first, middle, last = low + width // 4, low + width // 2, low + 3 * width // 4
        amounts = tl.zeros([BLOCK_V], tl.float32)
        amounts_middle = tl.zeros([BLOCK_V], tl.float32)
        amounts_last = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, num_columns, BLOCK_V):
            columns = start + block
            z = _scores(row_ptr, seen_ptr, stops_ptr, columns, num_columns, stride_v,
                        temperature, penalty, suppresses, num_stops, HAS_PENALTY, HAS_STOPS)
            weight = (columns < num_columns).to(tl.float32)
            if BY_MASS:
                weight = tl.where(z >= floor, tl.exp(z - maximum), 0.0)
            order = _order(z).to(tl.int64)
            amounts += tl.where(order >= first, weight, 0.0)
            amounts_middle += tl.where(order >= middle, weight, 0.0)
            amounts_last += tl.where(order >= last, weight, 0.0)
        if tl.sum(amounts_last, axis=0) >= share:
            low = last
        elif tl.sum(amounts_middle, axis=0) >= share:
            low, high = middle, last
        elif tl.sum(amounts, axis=0) >= share:
            low, high = first, middle
        else:
            high = first
    key = low.to(tl.int32)
    return tl.where(key >= 0, key, key ^ MANTISSA_FLIP).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, seeds_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    greedy_ptr, raw_ptr, penalty_ptr, seen_ptr, stops_ptr, suppresses_ptr,
    token_ids_ptr, logprobs_ptr, entropy_ptr, stopped_ptr,
    num_columns, num_stops, stride_logits_b, stride_logits_v, stride_seen_b, stride_stops_b,
    TRUNCATES: tl.constexpr, HAS_PENALTY: tl.constexpr, HAS_STOPS: tl.constexpr,
    BLOCK_V: tl.constexpr, NUM_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_b
    stops_ptr += row * stride_stops_b
    seen_ptr += row * stride_seen_b
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    penalty = 1.0
    if HAS_PENALTY:
        penalty = tl.load(penalty_ptr + row).to(tl.float32)
    suppresses = False
    if HAS_STOPS:
        suppresses = tl.load(suppresses_ptr + row) != 0
    block = tl.arange(0, BLOCK_V)
    tiles = tl.arange(0, NUM_TILES)
    num_tiles = tl.cdiv(num_columns, BLOCK_V)

    floor = tl.full([], float("-inf"), tl.float32)
    if TRUNCATES:
        maxima = tl.full([BLOCK_V], float("-inf"), tl.float32)
        for start in range(0, num_columns, BLOCK_V):
            maxima = tl.maximum(maxima, _scores(
                row_ptr, seen_ptr, stops_ptr, start + block, num_columns, stride_logits_v,
                temperature, penalty, suppresses, num_stops, HAS_PENALTY, HAS_STOPS))
        largest = tl.max(maxima, axis=0)
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < num_columns):
            floor = _least_kept(
                row_ptr, seen_ptr, stops_ptr, num_columns, stride_logits_v, temperature, penalty,
                suppresses, num_stops, largest, floor, top_k.to(tl.float32),
                False, HAS_PENALTY, HAS_STOPS, BLOCK_V)
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
        if top_p < 1:
            floor = tl.maximum(floor, _least_kept(
                row_ptr, seen_ptr, stops_ptr, num_columns, stride_logits_v, temperature, penalty,
                suppresses, num_stops, largest, floor, top_p,
                True, HAS_PENALTY, HAS_STOPS, BLOCK_V))
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        if min_p > 0:
            floor = tl.maximum(floor, largest + tl.log(min_p))

    # The kept distribution: as reduce_row, and a sum for each tile, relative to the largest score
    # up to that tile.
    maximum = tl.full([], float("-inf"), tl.float32)
    best = tl.zeros([], tl.int32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    weighted = tl.zeros([BLOCK_V], tl.float32)
    tile_sums = tl.zeros([NUM_TILES], tl.float32)
    tile_maxima = tl.zeros([NUM_TILES], tl.float32)
    for i in range(num_tiles):
        columns = i * BLOCK_V + block
        z = _scores(row_ptr, seen_ptr, stops_ptr, columns, num_columns, stride_logits_v,
                    temperature, penalty, suppresses, num_stops, HAS_PENALTY, HAS_STOPS)
        z = tl.where(z < floor, float("-inf"), z)  # NaN stays
        of_tile = tl.max(z, axis=0)
        if of_tile > maximum:
            best = tl.min(tl.where(z == of_tile, columns, num_columns), axis=0)
        larger = tl.maximum(maximum, of_tile)
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        shift = tl.maximum(maximum - finite, NEGLIGIBLE)
        scale = tl.exp(shift)
        gap = z - finite
        e = tl.exp(gap)
        weighted = (weighted + sums * shift) * scale + e * tl.maximum(gap, NEGLIGIBLE)
        sums = sums * scale + e
        tile_sums = tl.where(tiles == i, tl.sum(e, axis=0), tile_sums)
        tile_maxima = tl.where(tiles == i, finite, tile_maxima)
        maximum = larger
    s = tl.sum(sums, axis=0)
    log_sum = tl.log(s)

    # Philox with the seed as its key and the position as its counter; u is inside (0, 1).
    position = tl.load(positions_ptr + row)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    nothing = tl.zeros([], tl.uint32)
    word, word_1, word_2, word_3 = tl.philox(tl.load(seeds_ptr + row), low, high, nothing, nothing)
    u = (word.to(tl.float64) + 0.5) * (2.0**-32)

    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = (tile_sums * tl.exp(tl.minimum(tile_maxima - finite, 0.0))).to(tl.float64)
    running = tl.cumsum(weights, axis=0)
    target = u * tl.max(running, axis=0)
    tile = tl.min(tl.where((running > target) & (weights > 0), tiles, NUM_TILES), axis=0)
    # Rounding may leave the target above the last sum: then it is the last tile with a token.
    tile = tl.where(tile == NUM_TILES, tl.max(tl.where(weights > 0, tiles, 0), axis=0), tile)
    weight = tl.sum(tl.where(tiles == tile, weights, 0.0), axis=0)
    before = tl.sum(tl.where(tiles == tile, running - weights, 0.0), axis=0)
    of_tile = tl.sum(tl.where(tiles == tile, tile_maxima, 0.0), axis=0)
    columns = tile * BLOCK_V + block
    z = _scores(row_ptr, seen_ptr, stops_ptr, columns, num_columns, stride_logits_v, temperature,
                penalty, suppresses, num_stops, HAS_PENALTY, HAS_STOPS)
    e = tl.exp(tl.where(z < floor, float("-inf"), z) - of_tile).to(tl.float64)
    running = tl.cumsum(e, axis=0)
    target = (target - before) / weight * tl.max(running, axis=0)
    is_possible = e > 0
    offset = tl.min(tl.where((running > target) & is_possible, block, BLOCK_V), axis=0)
    last = tl.max(tl.where(is_possible, block, -1), axis=0)
    offset = tl.where(offset == BLOCK_V, last, offset)
    token = tl.where(offset < 0, num_columns - 1, tile * BLOCK_V + offset)  # a row of NaN
    token = tl.where(tl.load(greedy_ptr + row) != 0, best, token)

    z = _scores(row_ptr, seen_ptr, stops_ptr, token, num_columns, stride_logits_v, temperature,
                penalty, suppresses, num_stops, HAS_PENALTY, HAS_STOPS)
    logprob = z - maximum - log_sum
    if tl.load(raw_ptr + row) != 0:
        inverse = tl.div_rn(1.0, temperature)
        raw_maximum, raw_log_sum, raw_entropy = reduce_row(
            row_ptr, row_ptr, num_columns, stride_logits_v, inverse, False, BLOCK_V)
        z = tl.load(row_ptr + token.to(tl.int64) * stride_logits_v).to(tl.float32)
        logprob = z * inverse - raw_maximum - raw_log_sum
    stopped = False
    if HAS_STOPS:
        for i in range(num_stops):
            stopped = stopped | (tl.load(stops_ptr + i) == token)
    tl.store(token_ids_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, log_sum - tl.sum(weighted, axis=0) / s)
    tl.store(stopped_ptr + row, stopped)


class Sampled(NamedTuple):
    """One entry per row: token, log-prob, entropy, and whether the token is one of the stops."""

    token_ids: Tensor
    logprobs: Tensor
    entropy: Tensor
    stopped: Tensor


def sample_fwd(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
    repetition_penalty: Tensor | None, seen: Tensor | None, stop_token_ids: Tensor | None,
    suppresses_stops: Tensor | None, truncates: bool,
) -> Sampled:
    """One launch; without `truncates` no row asks for top_k, top_p or min_p."""
    num_rows, num_columns = logits.shape
    columns = (seeds, positions, temperature, top_k, top_p, min_p, greedy, raw_logprobs)
    seeds, positions, temperature, top_k, top_p, min_p, greedy, raw_logprobs = (
        x.contiguous() for x in columns)
    result = Sampled(torch.empty(num_rows, dtype=torch.int64, device=logits.device),
                     torch.empty(num_rows, dtype=torch.float32, device=logits.device),
                     torch.empty(num_rows, dtype=torch.float32, device=logits.device),
                     torch.empty(num_rows, dtype=torch.bool, device=logits.device))
    has_stops, has_penalty = stop_token_ids is not None, seen is not None
    stops = seeds if stop_token_ids is None else stop_token_ids.contiguous()
    suppresses = greedy if suppresses_stops is None else suppresses_stops.contiguous()
    if has_stops and suppresses_stops is None:
        suppresses = torch.zeros_like(greedy)
    seen_rows = greedy if seen is None else seen.contiguous()
    penalty = temperature if repetition_penalty is None else repetition_penalty.contiguous()
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(num_columns)))
    if num_rows > 0:
        _sample_kernel[(num_rows,)](
            logits, seeds, positions, temperature, top_k, top_p, min_p, greedy, raw_logprobs,
            penalty, seen_rows, stops, suppresses, *result, num_columns,
            stops.shape[1] if has_stops else 0, logits.stride(0), logits.stride(1),
            seen_rows.stride(0), stops.stride(0),
            TRUNCATES=truncates, HAS_PENALTY=has_penalty, HAS_STOPS=has_stops, BLOCK_V=block,
            NUM_TILES=triton.next_power_of_2(triton.cdiv(num_columns, block)),
            num_warps=8 if block == MAX_BLOCK else 4,
        )
    return result


# What a compiled graph holds; eager code calls sample_fwd, which costs the host less.
@torch.library.custom_op("fastrl_kernels::sample_tokens", mutates_args=())
def _sample_op(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
    repetition_penalty: Tensor | None, seen: Tensor | None, stop_token_ids: Tensor | None,
    suppresses_stops: Tensor | None, truncates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token_ids, logprobs, entropy, stopped = sample_fwd(
        logits, seeds, positions, temperature, top_k, top_p, min_p, greedy, raw_logprobs,
        repetition_penalty, seen, stop_token_ids, suppresses_stops, truncates)
    return token_ids, logprobs, entropy, stopped


@_sample_op.register_fake
def _(logits: Tensor, *others: object) -> tuple[Tensor, ...]:
    num_rows = logits.shape[0]
    return (logits.new_empty(num_rows, dtype=torch.int64),
            logits.new_empty(num_rows, dtype=torch.float32),
            logits.new_empty(num_rows, dtype=torch.float32),
            logits.new_empty(num_rows, dtype=torch.bool))


def sample_tokens(*arguments: Tensor | bool | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fastrl.ops.sample_tokens on this backend; the arguments of `sample_fwd`."""
    run = _sample_op if torch.compiler.is_compiling() else sample_fwd
    return run(*arguments)  # type: ignore[arg-type]


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {
        "seeds_ptr": "*i64", "positions_ptr": "*i64", "temperature_ptr": "*fp32",
        "top_k_ptr": "*i64", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32", "greedy_ptr": "*i1",
        "raw_ptr": "*i1", "penalty_ptr": "*fp32", "seen_ptr": "*i1", "stops_ptr": "*i64",
        "suppresses_ptr": "*i1", "token_ids_ptr": "*i64", "logprobs_ptr": "*fp32",
        "entropy_ptr": "*fp32", "stopped_ptr": "*i1", "num_columns": "i32", "num_stops": "i32",
        "stride_logits_b": "i32", "stride_logits_v": "i32", "stride_seen_b": "i32",
        "stride_stops_b": "i32",
    }
    names = ("TRUNCATES", "HAS_PENALTY", "HAS_STOPS")
    flags = itertools.product((True, False), repeat=3) if every else [(True, True, True)]
    return [
        (_sample_kernel, {**types, "logits_ptr": f"*{dtype}"},
         {**dict(zip(names, values, strict=True)), "BLOCK_V": MAX_BLOCK, "NUM_TILES": 64,
          "num_warps": 8})
        for values, dtype in itertools.product(flags, DTYPES)
    ]
