"""The engine against a plain loop: a full forward per token, no cache, no batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.errors import ConfigError, DataError
from fastrl.models import CausalLM, DecoderConfig, PackedAttention, new_decoder
from fastrl.ops import sample_tokens
from fastrl.ops.logprob import gather_logprobs
from fastrl.ops.sampling import request_seeds
from fastrl.packing import pack_sequences

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 44, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 4, "head_dim": 6, "max_positions": 96, "initializer_range": 0.3,
}
CONFIGS = {
    "llama": DecoderConfig(family="llama", **(SMALL | {"num_kv_heads": 2}), rotary_dim=6),
    "mistral": DecoderConfig(family="mistral", **(SMALL | {"num_kv_heads": 1}), rotary_dim=6,
                             windows=(5, 7)),
    "gpt2": DecoderConfig(family="gpt2", **SMALL, norm="layer", activation="gelu_new",
                          gated_mlp=False, qkv_bias=True, attention_out_bias=True, mlp_bias=True,
                          tie_embeddings=True),
    "gpt_neox": DecoderConfig(family="gpt_neox", **SMALL, norm="layer", activation="gelu",
                              gated_mlp=False, rotary_dim=2, parallel_residual=True),
}
PROMPTS = [[3, 9, 4], [7], list(range(20, 41)), [5, 5, 5, 5], [8] * 17, [60, 2, 11, 44, 1]]


def _model(name: str = "llama", seed: int = 0) -> CausalLM:
    return new_decoder(CONFIGS[name], seed)


@torch.no_grad()
def _plain(
    model: CausalLM, prompt: Sequence[int], sampling: SamplingConfig, seed: int, request_id: int
) -> tuple[list[int], list[float], list[float]]:
    """Tokens, log-probs and entropies of one response, with a full forward for each token."""
    model.eval()
    seeds = request_seeds(seed, torch.tensor([request_id]))
    tokens, outputs = list(prompt), []
    settings = {"temperature": torch.tensor([sampling.temperature]),
                "top_k": torch.tensor([sampling.top_k]), "top_p": torch.tensor([sampling.top_p]),
                "min_p": torch.tensor([sampling.min_p]), "greedy": torch.tensor([sampling.greedy]),
                "raw_logprobs": torch.tensor([sampling.logprobs == "raw"])}
    for _ in range(sampling.max_new_tokens):
        packed = pack_sequences([tokens])
        hidden = model(packed.token_ids, packed.positions,
                       PackedAttention(packed.cu_seqlens, packed.max_seqlen))
        logits = model.lm_head(hidden[-1:], F.linear)
        token, logprob, entropy, _ = sample_tokens(
            logits, seeds, torch.tensor([len(tokens)]), **settings)
        tokens.append(int(token))
        outputs.append((int(token), float(logprob), float(entropy)))
        if int(token) in (sampling.stop_token_ids or ()):
            break
    token_ids, logprobs, entropy_values = zip(*outputs, strict=True)
    return list(token_ids), list(logprobs), list(entropy_values)


SETTINGS = {
    "greedy": SamplingConfig(max_new_tokens=14, greedy=True, stop_token_ids=(2, 7, 30)),
    "seeded": SamplingConfig(max_new_tokens=14, stop_token_ids=(2, 7, 30, 31, 32, 33)),
    "all": SamplingConfig(max_new_tokens=14, temperature=0.8, top_k=30, top_p=0.9, min_p=0.01),
    "raw": SamplingConfig(max_new_tokens=14, temperature=1.3, top_k=5, logprobs="raw"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_equals_uncached(name: str, setting: str) -> None:
    model, sampling = _model(name), SETTINGS[setting]
    # Few pages and places, so that sequences wait, leave and are preempted on the way.
    engine = Engine(model, EngineConfig(page_size=4, num_pages=24, max_batch_size=5,
                                        max_prefill_tokens=24))
    rollout = engine.generate(PROMPTS, sampling, seed=5, num_samples_per_prompt=2,
                              first_request_id=100)
    for row in range(12):
        tokens, logprobs, entropy = _plain(model, PROMPTS[row // 2], sampling, 5, 100 + row)
        length = len(tokens)
        assert rollout.response(row) == tokens
        assert rollout.sequence(row) == PROMPTS[row // 2] + tokens
        assert rollout.rollout_logprobs[row, :length].tolist() == pytest.approx(logprobs, abs=1e-5)
        assert rollout.entropy[row, :length].tolist() == pytest.approx(entropy, abs=1e-4)
        assert not rollout.rollout_logprobs[row, length:].any()
        assert not rollout.response_ids[row, length:].any()
        stopped = tokens[-1] in (sampling.stop_token_ids or ())
        assert rollout.finish_reasons[row] == ("stop" if stopped else "length")


def test_rollout_layout() -> None:
    rollout = Engine(_model()).generate(PROMPTS, SamplingConfig(max_new_tokens=3), seed=1,
                                        num_samples_per_prompt=2)
    assert rollout.batch_size == 12 and rollout.num_samples_per_prompt == 2
    assert rollout.prompt_lens.tolist() == [3, 3, 1, 1, 21, 21, 4, 4, 17, 17, 5, 5]
    assert torch.equal(rollout.seqlens, rollout.prompt_lens + rollout.response_lens)
    assert rollout.cu_seqlens[-1] == len(rollout.token_ids)
    assert rollout.response_ids.dtype == torch.int64
    assert rollout.rollout_logprobs.dtype == rollout.entropy.dtype == torch.float32
    assert rollout.max_response_len == rollout.response_lens.max() == 3


def test_logprobs_are_those_of_the_training_ops_on_the_same_prefix() -> None:
    model = _model("mistral")
    rollout = Engine(model).generate(PROMPTS, SamplingConfig(max_new_tokens=12, temperature=0.7))
    with torch.no_grad():
        for row in range(rollout.batch_size):
            packed = pack_sequences([rollout.sequence(row)])
            hidden = model(packed.token_ids, packed.positions,
                           PackedAttention(packed.cu_seqlens, packed.max_seqlen))
            logits = model.lm_head(hidden, F.linear)
            begin = int(rollout.prompt_lens[row])
            logprobs, entropy = gather_logprobs(
                logits[begin - 1 : -1], packed.token_ids[begin:], temperature=0.7)
            torch.testing.assert_close(rollout.rollout_logprobs[row], logprobs, rtol=0, atol=1e-5)
            torch.testing.assert_close(rollout.entropy[row], entropy, rtol=0, atol=1e-4)


def test_samples_of_a_prompt_differ_and_seeds_count() -> None:
    engine, sampling = Engine(_model()), SamplingConfig(max_new_tokens=10)
    first = engine.generate([[3, 4]], sampling, seed=0, num_samples_per_prompt=16)
    assert len({tuple(first.response(row)) for row in range(16)}) == 16
    again = engine.generate([[3, 4]], sampling, seed=0, num_samples_per_prompt=16)
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.rollout_logprobs, again.rollout_logprobs)
    other = engine.generate([[3, 4]], sampling, seed=1, num_samples_per_prompt=16)
    later = engine.generate([[3, 4]], sampling, seed=0, num_samples_per_prompt=16,
                            first_request_id=8)
    assert not torch.equal(first.token_ids, other.token_ids)
    assert torch.equal(first.response_ids[8:], later.response_ids[:8])


def test_stop_tokens_come_from_the_model_unless_given() -> None:
    config = DecoderConfig(family="llama", **SMALL, rotary_dim=6, eos_token_ids=tuple(range(30)))
    engine = Engine(new_decoder(config, 0))
    sampling = SamplingConfig(max_new_tokens=40)
    rollout = engine.generate(PROMPTS, sampling)
    assert "stop" in rollout.finish_reasons
    for row, reason in enumerate(rollout.finish_reasons):
        response = rollout.response(row)
        assert all(token >= 30 for token in response[:-1])
        assert (reason == "stop") == (response[-1] < 30)
    rollout = engine.generate(PROMPTS, SamplingConfig(max_new_tokens=40, stop_token_ids=()))
    assert set(rollout.finish_reasons) == {"length"}
    assert rollout.response_mask.all()


def test_min_new_tokens_masks_stop_tokens_before_drawing() -> None:
    engine = Engine(_model())
    stops = tuple(range(30))
    rollout = engine.generate(PROMPTS, SamplingConfig(max_new_tokens=40, stop_token_ids=stops,
                                                      min_new_tokens=6))
    assert rollout.response_lens.min() > 6
    assert (rollout.response_ids[:, :6] >= 30).all()
    raw = engine.generate(PROMPTS, SamplingConfig(max_new_tokens=40, stop_token_ids=stops,
                                                  min_new_tokens=6, logprobs="raw"))
    assert torch.equal(raw.response_ids, rollout.response_ids)
    # Drawn among 31 of 61 tokens: the model's own log-prob of the same token is lower.
    early = rollout.rollout_logprobs[:, :6] - raw.rollout_logprobs[:, :6]
    assert early.min() > 0
    torch.testing.assert_close(rollout.rollout_logprobs[:, 6:], raw.rollout_logprobs[:, 6:])


def test_repetition_penalty_counts_prompt_and_response() -> None:
    model = _model()
    sampling = SamplingConfig(max_new_tokens=10, greedy=True, repetition_penalty=1e6)
    rollout = Engine(model).generate(PROMPTS, sampling)
    for row in range(len(PROMPTS)):
        response = rollout.response(row)
        assert len(set(response)) == 10 and not set(response) & set(PROMPTS[row])
    # By hand, first token: logits of tokens of the prompt are divided or multiplied by 2.
    sampling = SamplingConfig(max_new_tokens=1, repetition_penalty=2.0)
    rollout = Engine(model).generate([[3, 9, 4]], sampling)
    packed = pack_sequences([[3, 9, 4]])
    with torch.no_grad():
        hidden = model(packed.token_ids, packed.positions, PackedAttention(packed.cu_seqlens, 3))
        logits = model.lm_head(hidden[-1:], F.linear)[0]
    for token in (3, 9, 4):
        logits[token] = logits[token] / 2 if logits[token] > 0 else logits[token] * 2
    expected = logits.log_softmax(-1)[rollout.response_ids[0, 0]]
    assert rollout.rollout_logprobs[0, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_positions_of_the_model_bound_the_length() -> None:
    for name in ("llama", "gpt2"):  # learned positions would be read out of range
        rollout = Engine(_model(name)).generate(
            [[4] * 90, [4] * 95, [4]], SamplingConfig(max_new_tokens=500))
        assert rollout.response_lens.tolist() == [6, 1, 95]
        assert set(rollout.finish_reasons) == {"length"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "1 to 95 tokens"), ([4] * 96, "got 96"), ([61], "from 0 to 60"), ([-1], "from 0 to 60")],
)
def test_bad_prompts(prompt: list[int], message: str) -> None:
    with pytest.raises(DataError, match=f"prompt 1: .*{message}"):
        Engine(_model()).generate([[3], prompt])


def test_bad_settings() -> None:
    engine = Engine(_model(), EngineConfig(page_size=4, num_pages=3))
    with pytest.raises(ConfigError, match="encoder"):
        engine.generate([[3]], SamplingConfig(stop_strings=("a",)))
    with pytest.raises(ConfigError, match="at least one prompt"):
        engine.generate([])
    beyond = SamplingConfig(stop_token_ids=(3, 61))
    with pytest.raises(ConfigError, match="ids from 0 to 60, the model's vocabulary, got 61"):
        engine.generate([[1], [2]], [SamplingConfig(stop_token_ids=(60,)), beyond])
    with pytest.raises(ConfigError, match="stop_token_ids"):
        next(engine.stream([1], beyond))
    with pytest.raises(ConfigError, match="response 1 may need 4 pages of 4 tokens"):
        engine.generate([[3], [4] * 9], SamplingConfig(max_new_tokens=5))
    assert engine.generate([[3], [4] * 9], SamplingConfig(max_new_tokens=4)).batch_size == 2


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model = _model().train()
    model.backbone.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model.backbone.residual_dropout = 0.5  # must be off while generating
    engine = Engine(model)
    rollout = engine.generate(PROMPTS, SamplingConfig(max_new_tokens=5))
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() and not rollout.rollout_logprobs.requires_grad
    model.backbone.residual_dropout = 0.0
    assert torch.equal(engine.generate(PROMPTS, SamplingConfig(max_new_tokens=5)).token_ids,
                       rollout.token_ids)


def test_new_weights_are_used_at_once() -> None:
    model, other = _model(seed=0), _model(seed=1)
    engine, sampling = Engine(model), SamplingConfig(max_new_tokens=8)
    before = engine.generate(PROMPTS, sampling)
    model.load_state_dict(other.state_dict())
    engine.weights_changed()
    after = engine.generate(PROMPTS, sampling)
    assert not torch.equal(before.response_ids, after.response_ids)
    assert torch.equal(after.token_ids, Engine(other).generate(PROMPTS, sampling).token_ids)


def test_progress() -> None:
    calls: list[tuple[int, int, int]] = []
    Engine(_model()).generate(PROMPTS, SamplingConfig(max_new_tokens=5),
                              on_progress=lambda *numbers: calls.append(numbers))
    assert calls[0] == (6, 0, 6) and calls[-1] == (30, 6, 6)
    assert calls == sorted(calls)


def test_cancel_all() -> None:
    engine = Engine(_model(), EngineConfig(max_batch_size=4))

    def cancel_late(num_tokens: int, num_finished: int, total: int) -> None:
        if num_tokens >= 12:
            engine.cancel()

    sampling = SamplingConfig(max_new_tokens=50)
    rollout = engine.generate(PROMPTS, sampling, on_progress=cancel_late)
    assert rollout.finish_reasons == ("cancelled",) * 6
    assert rollout.response_lens.tolist() == [3, 3, 3, 3, 0, 0]
    whole = engine.generate(PROMPTS, sampling)
    assert torch.equal(rollout.response_ids[:4], whole.response_ids[:4, :3])


def test_cancel_some() -> None:
    engine = Engine(_model())

    def cancel_two(num_tokens: int, num_finished: int, total: int) -> None:
        if num_tokens == 12:
            engine.cancel([1, 4])

    sampling = SamplingConfig(max_new_tokens=9)
    rollout = engine.generate(PROMPTS, sampling, on_progress=cancel_two)
    whole = engine.generate(PROMPTS, sampling)
    assert rollout.response_lens.tolist() == [9, 2, 9, 9, 2, 9]
    assert [rollout.finish_reasons[row] for row in (1, 4)] == ["cancelled", "cancelled"]
    for row in (0, 2, 3, 5):
        assert rollout.response(row) == whole.response(row)


def test_bfloat16_and_float64_models() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = new_decoder(CONFIGS["llama"], 0, dtype=dtype)
        rollout = Engine(model).generate(PROMPTS, SamplingConfig(max_new_tokens=6))
        assert rollout.response_mask.all() and rollout.rollout_logprobs.isfinite().all()
