"""sample_tokens: draw one token per row by inverse CDF from counter-based random numbers.

    p   = softmax(truncate(adjust(logits) / temperature))
    u   = (Philox4x32-10(key = seed, counter = position) + 0.5) / 2^32, inside (0, 1)
    token = first v with p_0 + ... + p_v > u * sum(p)

A token depends on its own row, seed and position only: not on the device, the batch or its order.
Shape letters: B rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import check_device, check_values
from fastrl.errors import ShapeError
from fastrl.ops.logprob import gather_logprobs_reference

# The torch form asks the host several times in a call, which a captured decode step cannot do, so
# a GPU takes a kernel; which of the two is to be measured.
PREFERENCE = ("triton", "cuda", "torch")

_LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
TILE = 256
"""Tokens whose probabilities are summed before the drawn one is searched among them."""
CHUNK_BYTES = 2**19
"""Logits of a thread that are taken at a time on a CPU, so that every pass finds them in cache."""
DTYPES = {"seeds": torch.int64, "positions": torch.int64, "top_k": torch.int64,
          "greedy": torch.bool, "raw_logprobs": torch.bool, "seen": torch.bool,
          "stop_token_ids": torch.int64, "suppresses_stops": torch.bool}
_REQUEST_COUNTER = 1
"""Third counter word of request seeds; tokens use 0, so the two streams never meet."""


class SampledTokens(NamedTuple):
    """One entry per row."""

    token_ids: Tensor
    """[B] int64."""
    logprobs: Tensor
    """[B] float32, of the token."""
    entropy: Tensor
    """[B] float32, nats, of the distribution drawn from."""
    stopped: Tensor
    """[B] bool, the token is one of the row's stop tokens."""


def philox(key: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10: four random 32-bit words for each key and counter.

    Args:
        key: [2, B] int64, 32-bit words.
        counter: [4, B] int64, 32-bit words.
    Returns:
        [4, B] int64, each in [0, 2^32).
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    Example:
        >>> words = philox(torch.zeros(2, 1).long(), torch.zeros(4, 1).long())
        >>> [f"{int(word):08x}" for word in words]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    multipliers = torch.tensor(_MULTIPLIERS, device=key.device)[:, None]
    steps = torch.tensor(_KEY_STEPS, device=key.device)[:, None]
    rounds = torch.arange(_ROUNDS, device=key.device)[:, None, None]
    keys = (key + rounds * steps) & _LOW_32  # [rounds, 2, B]
    even, odd = counter[0::2], counter[1::2]  # [2, B] each: words 0 and 2, words 1 and 3
    for round_key in keys.unbind():
        product = even * multipliers  # wraps modulo 2^64, which leaves all 64 bits right
        even = ((product >> 32) & _LOW_32).flip(0) ^ odd ^ round_key
        odd = (product & _LOW_32).flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def _words(seeds: Tensor, counters: Tensor, stream: int) -> Tensor:
    """[4, B] Philox words with 64-bit seeds and counters [B], both int64."""
    key = torch.stack([seeds & _LOW_32, (seeds >> 32) & _LOW_32])
    low, high = counters & _LOW_32, (counters >> 32) & _LOW_32
    return philox(key, torch.stack([low, high, torch.full_like(low, stream), low * 0]))


def request_seeds(seed: int, request_ids: Tensor) -> Tensor:
    """The seed of each request of a run.

    Args:
        seed: Seed of the run, any 64-bit integer.
        request_ids: [B] int64.
    Returns:
        [B] int64, different for every request of the run.
    """
    words = _words(torch.full_like(request_ids, seed), request_ids, _REQUEST_COUNTER)
    return (words[1] << 32) | words[0]


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """[B] float64 inside the open interval (0, 1), one for each seed and position [B] int64."""
    return (_words(seeds, positions, 0)[0].double() + 0.5) * 2.0**-32


def sample_tokens_reference(
    logits: Tensor, seeds: Tensor, positions: Tensor, *, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
    repetition_penalty: Tensor | None = None, seen: Tensor | None = None,
    stop_token_ids: Tensor | None = None, suppresses_stops: Tensor | None = None,
) -> SampledTokens:
    """sample_tokens, one row at a time in float64."""
    drawn = uniforms(seeds, positions)
    rows = []
    for row in range(len(logits)):
        wide = logits[row].double()
        raw = (wide / temperature[row]).log_softmax(dim=-1)
        stops = [] if stop_token_ids is None else stop_token_ids[row].tolist()
        if repetition_penalty is not None and seen is not None:
            penalised = torch.where(wide > 0, wide / repetition_penalty[row],
                                    wide * repetition_penalty[row])
            wide = torch.where(seen[row], penalised, wide)
        if suppresses_stops is not None and suppresses_stops[row]:
            wide = wide.clone()
            wide[[stop for stop in stops if 0 <= stop < len(wide)]] = -torch.inf
        whole = (wide / temperature[row]).log_softmax(dim=-1)
        kept = whole.clone()
        if top_k[row] > 0:
            smallest = whole.sort(descending=True).values[: int(top_k[row])][-1]
            kept[whole < smallest] = -torch.inf
        if top_p[row] < 1:
            ordered = kept.softmax(dim=-1).sort(descending=True).values
            reached = int((ordered.cumsum(0) < top_p[row]).sum())
            kept[kept.softmax(dim=-1) < ordered[min(reached, len(ordered) - 1)]] = -torch.inf
        kept[whole < whole.max() + min_p[row].log()] = -torch.inf
        logprobs = kept.log_softmax(dim=-1)
        cdf = logprobs.exp().cumsum(0)
        token = int((cdf <= drawn[row] * cdf[-1]).sum())
        if greedy[row]:
            token = int(whole.argmax())
        entropy = torch.special.entr(logprobs.exp()).sum()
        rows.append((token, raw[token] if raw_logprobs[row] else logprobs[token], entropy,
                     token in stops))
    token_ids, logprobs_B, entropy_B, stopped = zip(*rows, strict=True)
    device = logits.device
    return SampledTokens(
        torch.tensor(token_ids, device=device), torch.stack(logprobs_B).float(),
        torch.stack(entropy_B).float(), torch.tensor(stopped, device=device))


def _check(
    logits: Tensor, columns: dict[str, Tensor | None], seen: Tensor | None,
    stop_token_ids: Tensor | None,
) -> None:
    op = "sample_tokens"
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ShapeError(f"{op}: expected logits [B, V] of a floating type, V at least 1, got "
                         f"{list(logits.shape)} {logits.dtype}")
    batch_size, vocab_size = logits.shape
    for name, tensor in columns.items():
        if tensor is not None and tensor.shape != (batch_size,):
            raise ShapeError(f"{op}: expected {name} [{batch_size}], one per row of logits, got "
                             f"{list(tensor.shape)}")
    if seen is not None and seen.shape != logits.shape:
        raise ShapeError(f"{op}: expected seen [{batch_size}, {vocab_size}], as the logits, got "
                         f"{list(seen.shape)}")
    if stop_token_ids is not None and (stop_token_ids.dim() != 2
                                       or stop_token_ids.shape[0] != batch_size):
        raise ShapeError(f"{op}: expected stop_token_ids [{batch_size}, E], a row per row of "
                         f"logits, got {list(stop_token_ids.shape)}")
    if (seen is None) != (columns["repetition_penalty"] is None):
        raise ShapeError(f"{op}: expected repetition_penalty and seen together, got one of them")
    if columns["suppresses_stops"] is not None and stop_token_ids is None:
        raise ShapeError(f"{op}: expected stop_token_ids with suppresses_stops, got none")
    tensors = {**columns, "seen": seen, "stop_token_ids": stop_token_ids}
    for name, dtype in DTYPES.items():
        tensor = tensors[name]
        if tensor is not None and tensor.dtype != dtype:
            raise ShapeError(f"{op}: expected {name} {dtype}, got {tensor.dtype}")
    check_device(op, {"logits": logits, **{k: v for k, v in tensors.items() if v is not None}})
    check_values(op, logits=logits)


def sample_tokens(
    logits: Tensor, seeds: Tensor, positions: Tensor, *, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
    repetition_penalty: Tensor | None = None, seen: Tensor | None = None,
    stop_token_ids: Tensor | None = None, suppresses_stops: Tensor | None = None,
    is_truncated: bool = True, backend: str | None = None,
) -> SampledTokens:
    """One token per row, its log-probability, the entropy of the distribution, and a stop flag.

        adjusted = logits, penalised where seen, -inf for suppressed stops
        kept = top_k, then top_p of what is left, then min_p, of adjusted / temperature
        p = softmax(kept)

    Tokens that tie with the last one kept by top_k or top_p are kept too, so that what is kept
    does not depend on the order of the vocabulary.

    Args:
        logits: [B, V], any floating type; computed in float32 at least. -inf is never drawn.
        seeds: [B] int64, the key of the random numbers.
        positions: [B] int64, the counter: another position gives an independent number.
        temperature: [B], above 0. Divides the logits.
        top_k: [B] int64. Keep the k most likely tokens; 0 keeps all.
        top_p: [B]. Keep the smallest set with at least this probability; 1 keeps all.
        min_p: [B]. Drop tokens below this share of the most likely one; 0 keeps all.
        greedy: [B] bool. True takes the most likely token, the lowest id among equals; log-prob
            and entropy stay those of the distribution that would have been drawn from.
        raw_logprobs: [B] bool. True reports the log-prob of the logits as they came (temperature
            only).
        repetition_penalty: [B], above 0. Divides positive and multiplies negative logits of tokens
            that were seen; 1 changes nothing. Given with `seen`.
        seen: [B, V] bool. Tokens that the penalty is for.
        stop_token_ids: [B, E] int64. Tokens that set the stop flag; -1 is none.
        suppresses_stops: [B] bool. True never draws a stop token.
        is_truncated: False says that no row asks for top_k, top_p or min_p, which saves a GPU
            a search that it could not leave out by itself.
        backend: See fastrl.backends.
    Returns:
        SampledTokens. No gradient.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: one pass over the logits, on a CPU six in cache. With top_k or top_p a CPU sorts each row,
        a GPU reads it again, up to 17 times for each of them.
    Source: Salmon et al. 2011 for the random numbers; top-p: Holtzman et al. 2020
        (arXiv 1904.09751); min-p: Nguyen et al. 2024 (arXiv 2407.01082); repetition penalty:
        Keskar et al. 2019 (arXiv 1909.05858).
    """
    columns = {
        "seeds": seeds, "positions": positions, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "greedy": greedy, "raw_logprobs": raw_logprobs,
        "repetition_penalty": repetition_penalty, "suppresses_stops": suppresses_stops}
    _check(logits, columns, seen, stop_token_ids)
    logits, temperature = logits.detach(), temperature.detach()
    name = choose("sample_tokens", "sampling", PREFERENCE, logits.device.type, logits.dtype,
                  backend)
    arguments = (logits, seeds, positions, temperature, top_k, top_p, min_p, greedy, raw_logprobs,
                 repetition_penalty, seen, stop_token_ids, suppresses_stops)
    if name == "triton":
        from fastrl_kernels.triton import sampling as triton_sampling

        return SampledTokens(*triton_sampling.sample_tokens(*arguments, is_truncated))
    if name == "cuda":
        from fastrl_kernels.cuda import sampling as cuda_sampling

        return SampledTokens(*cuda_sampling.sample_tokens(*arguments))
    return _sample_adjusted_torch(*arguments)


def _sample_adjusted_torch(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
    repetition_penalty: Tensor | None, seen: Tensor | None, stop_token_ids: Tensor | None,
    suppresses_stops: Tensor | None,
) -> SampledTokens:
    adjusted, is_adjusted = logits, torch.zeros_like(greedy)
    if repetition_penalty is not None and seen is not None:
        is_adjusted = repetition_penalty != 1
        penalty = repetition_penalty[:, None]
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        adjusted = torch.where(seen, penalised, logits)
    if suppresses_stops is not None and stop_token_ids is not None:
        is_adjusted = is_adjusted | suppresses_stops
        exists = (stop_token_ids >= 0) & (stop_token_ids < logits.shape[1])
        limits = torch.full_like(stop_token_ids, torch.inf, dtype=logits.dtype)
        limits.masked_fill_(exists & suppresses_stops[:, None], -torch.inf)
        adjusted = adjusted.scatter_reduce(
            1, stop_token_ids.clamp(0, logits.shape[1] - 1), limits.to(adjusted.dtype), "amin")
    token_ids, logprobs, entropy = _sample_tokens_torch(
        adjusted, seeds, positions, temperature, top_k, top_p, min_p, greedy, raw_logprobs)
    if adjusted is not logits and raw_logprobs.any():
        raw, _ = gather_logprobs_reference(logits / temperature[:, None], token_ids)
        logprobs = torch.where(raw_logprobs & is_adjusted, raw.float(), logprobs)
    stopped = torch.zeros_like(greedy)
    if stop_token_ids is not None:
        stopped = (token_ids[:, None] == stop_token_ids).any(dim=1)
    return SampledTokens(token_ids, logprobs, entropy, stopped)


def _sample_tokens_torch(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor,
    top_p: Tensor, min_p: Tensor, greedy: Tensor, raw_logprobs: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """First a few numbers for each row, some rows at a time, then one token for every row.

    The tile of the vocabulary is found from one sum per tile, then the token within it: running
    sums of whole rows would cost more than the softmax.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    divisor = temperature.to(dtype)[:, None] if (temperature != 1).any() else None
    cut_rows = (top_k > 0) | (top_p < 1) | (min_p > 0)
    is_cut = bool(cut_rows.any())
    num_rows = len(logits)
    if logits.device.type == "cpu":
        row_bytes = logits.shape[1] * dtype.itemsize
        num_rows = max(1, CHUNK_BYTES // row_bytes) * torch.get_num_threads()
    parts = []
    for first in range(0, max(1, len(logits)), num_rows):
        rows = slice(first, first + num_rows)
        scaled = _scaled(logits[rows], None if divisor is None else divisor[rows])
        if is_cut:
            cut = (_floor(scaled, top_k[rows], top_p[rows], min_p[rows]), _spread(scaled))
            scaled = scaled.masked_fill(scaled < cut[0], -torch.inf)
        parts.append((*_summary(scaled), *(cut if is_cut else ())))
    high, inner, sums, *cut_B = map(torch.cat, zip(*parts, strict=True))
    total = sums.sum(dim=-1, keepdim=True, dtype=torch.float64)
    log_total = total.log()

    tile, rest = _first_above(sums, uniforms(seeds, positions))
    columns = tile[:, None] * TILE + torch.arange(TILE, device=logits.device)
    inside = _scaled(logits.gather(1, columns.clamp_max(logits.shape[1] - 1)), divisor)
    if is_cut:
        inside = inside.masked_fill(inside < cut_B[0], -torch.inf)
    inside = (inside - high).exp().masked_fill(columns >= logits.shape[1], 0)
    offset, _ = _first_above(inside, rest)
    token_ids = (tile * TILE + offset).clamp_max(logits.shape[1] - 1)  # beyond: only rows of NaN
    if greedy.any():
        token_ids = torch.where(greedy, logits.argmax(dim=-1), token_ids)

    chosen = _scaled(logits.gather(1, token_ids[:, None]), divisor)
    logprobs, entropy = chosen - high - log_total, log_total - inner / total
    if is_cut:
        raw = chosen - high - cut_B[1]
        logprobs = torch.where((raw_logprobs & cut_rows)[:, None], raw, logprobs)
    return token_ids, logprobs.squeeze(1).float(), entropy.squeeze(1).float()


def _scaled(logits: Tensor, divisor: Tensor | None) -> Tensor:
    """Logits in float32 at least, divided by the temperature [B, 1]; None is 1."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if divisor is None else wide / divisor


def _spread(logits: Tensor) -> Tensor:
    """[B, 1], log of the sum over v of exp(z_v - the largest z)."""
    return (logits - logits.amax(dim=-1, keepdim=True)).logsumexp(dim=-1, keepdim=True)


def _summary(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is needed of rows [B, V]. A token weighs w_v = exp(z_v - the largest z).

    Returns:
        high, inner: [B, 1] each, the largest logit, and sum_v w_v log w_v;
        sums: [B, tiles], weights of TILE tokens each.
    """
    batch_size, vocab_size = logits.shape
    whole = vocab_size // TILE * TILE
    high = logits.amax(dim=-1, keepdim=True)
    shifted = logits - high
    weights = shifted.exp()
    sums = [weights[:, :whole].view(batch_size, whole // TILE, TILE).sum(dim=-1),
            weights[:, whole:].sum(dim=-1, keepdim=True)]
    # Where a weight is 0 its log may be -inf, and 0 * -inf is not a number.
    inner = shifted.clamp_min_(torch.finfo(logits.dtype).min).mul_(weights)
    return high, inner.sum(dim=-1, keepdim=True), torch.cat(sums, dim=1)


def _first_above(weights: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B] where the running sum of weights [B, K] passes drawn [B] x the total.

    And where inside that weight it does, from 0 to 1. The running sum is float64, never decreases
    and does not change over weights of 0; the target is below the total; so the weight is not 0.
    """
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1]
    target = torch.minimum(drawn * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cdf, target[:, None], right=True).clamp_max(weights.shape[1] - 1)
    weight = weights.gather(1, index)
    before = cdf.gather(1, index) - weight
    return index.squeeze(1), ((target[:, None] - before) / weight).squeeze(1).clamp(0, 1)


def _floor(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[B, 1], the smallest logit that is kept; -inf where a row keeps all."""
    floor = torch.full_like(logits[:, :1], -torch.inf)
    vocab_size = logits.shape[1]
    if (top_k > 0).any() or (top_p < 1).any():
        ordered = logits.sort(dim=-1, descending=True).values
        last = torch.where(top_k > 0, top_k, vocab_size).clamp_max(vocab_size)[:, None] - 1
        floor = ordered.gather(1, last)
        probs = ordered.masked_fill(ordered < floor, -torch.inf).softmax(dim=-1)
        before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
        reached = (before < top_p[:, None]).sum(dim=-1, keepdim=True) - 1
        nucleus = ordered.gather(1, reached.clamp_min(0))
        floor = torch.where(top_p[:, None] < 1, torch.maximum(floor, nucleus), floor)
    least = logits.amax(dim=-1, keepdim=True) + min_p[:, None].to(logits.dtype).log()
    return torch.maximum(floor, least)
