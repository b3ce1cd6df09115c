"""The engine over transformers' own code: equal but where two tokens are as good as tied."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.models import PackedAttention, load_causal_lm
from fastrl.ops.sampling import request_seeds, uniforms
from fastrl.packing import pack_sequences

MARGIN = 1e-5
PROMPTS = [[3, 9, 4], [7], list(range(20, 41)), [5, 5, 5, 5], [8] * 17, [60, 2, 11, 44, 1]]
SETTINGS: dict[str, dict[str, Any]] = {
    "phi3": {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "pad_token_id": 0, "sliding_window": None, "initializer_range": 0.3},
    "opt": {"vocab_size": 67, "hidden_size": 24, "ffn_dim": 36, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 24,
            "init_std": 0.3, "dropout": 0.1},
}


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **SETTINGS[request.param])
    path: Path = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_generic_models_generate_what_their_logits_say(folder: Path) -> None:
    model = load_causal_lm(folder)
    sampling = SamplingConfig(max_new_tokens=16, stop_token_ids=(2, 30))
    engine = Engine(model, EngineConfig(page_size=4, num_pages=30, max_batch_size=5))
    rollout = engine.generate(PROMPTS, sampling, seed=3, num_samples_per_prompt=3)
    num_tokens = num_ties = 0
    for row in range(rollout.batch_size):
        begin = int(rollout.prompt_lens[row])
        packed = pack_sequences([rollout.sequence(row)])
        with torch.no_grad():
            hidden = model(packed.token_ids, packed.positions,
                           PackedAttention(packed.cu_seqlens, packed.max_seqlen))
            logprobs = model.lm_head(hidden, F.linear).log_softmax(-1)[begin - 1 : -1].double()
        response = packed.token_ids[begin:, None]
        torch.testing.assert_close(rollout.rollout_logprobs[row, : len(response)].double(),
                                   logprobs.gather(1, response).squeeze(1), rtol=0, atol=1e-5)
        seeds = request_seeds(3, torch.tensor([row])).expand(len(response))
        drawn = uniforms(seeds, begin + torch.arange(len(response)))
        cdf = F.pad(logprobs.exp().cumsum(-1), (1, 0))
        low, high = cdf.gather(1, response).squeeze(1), cdf.gather(1, response + 1).squeeze(1)
        outside = torch.maximum(low - drawn, drawn - high)  # at most 0: the token that u names
        assert outside.max() < MARGIN
        num_tokens, num_ties = num_tokens + len(response), num_ties + int((outside > 0).sum())
    assert num_tokens > 150 and num_ties <= 1


def test_generic_models_do_not_mind_the_batch(folder: Path) -> None:
    model = load_causal_lm(folder)
    sampling = SamplingConfig(max_new_tokens=16, greedy=True)
    roomy = Engine(model, EngineConfig(page_size=4)).generate(PROMPTS, sampling)
    tight = Engine(model, EngineConfig(page_size=4, num_pages=12, max_batch_size=3)).generate(
        PROMPTS, sampling)
    differs = roomy.response_ids != tight.response_ids
    for row in differs.any(dim=1).nonzero().flatten().tolist():
        first = int(differs[row].nonzero()[0])  # the tokens after it follow from it
        margin = (roomy.rollout_logprobs - tight.rollout_logprobs)[row, first].abs()
        assert float(margin) < MARGIN  # two tokens were most likely to within 1e-5
    assert int(differs.any(dim=1).sum()) <= 1


def test_stories_continue_as_their_readme_says(shared: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = shared / "models" / "stories260k"
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    prompt = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]
    rollout = Engine(load_causal_lm(path)).generate(
        [prompt] * 2, SamplingConfig(max_new_tokens=48, greedy=True))
    text = tokenizer.decode(rollout.response(0))
    assert text.strip().startswith(
        "She loved to play outside in the park. One day, she saw a big, red ball. She wanted to "
        "play with it, but it was too high.")
    assert rollout.response(1) == rollout.response(0)
