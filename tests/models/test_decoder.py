"""The native decoder: packing, windows, pages, gradients, dropout, heads."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastrl.errors import ModelError
from fastrl.models import (
    LMHead,
    ModelSpec,
    PackedAttention,
    PagedAttention,
    ScalarHead,
    check_tokenizer,
    decoder_config,
    load_causal_lm,
    new_decoder,
    scalar_from_causal,
)
from fastrl.models.attention import Projections
from fastrl.models.config import DecoderConfig, RotaryScaling
from fastrl.models.decoder import Rotary, rotary_frequencies
from fastrl.ops import rms_norm, rotary
from fastrl.packing import pack_sequences

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
SEQUENCES = ((5, 7, 46, 9, 33, 3, 8, 40, 4), (4, 45, 3), (11,), (17, 18, 19, 20, 21))
SIZES = dict(vocab_size=47, hidden_size=24, intermediate_size=30, num_layers=2, num_heads=3,
             num_kv_heads=1, head_dim=8, max_positions=32, rotary_dim=8, initializer_range=0.3)


def small(family: str = "llama", tie: bool = True):
    config = decoder_config(family, vocab_size=47, hidden_size=24, num_layers=2, num_heads=3,
                            max_positions=32, tie_embeddings=tie)
    return new_decoder(config, seed=1)


def hidden_of(model, sequences=SEQUENCES):
    batch = pack_sequences(sequences)
    return model(batch.token_ids, batch.positions,
                 PackedAttention(batch.cu_seqlens, batch.max_seqlen))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_packed_equals_separate(family, dtype, tolerance):
    model = small(family).to(dtype)
    separate = torch.cat([hidden_of(model, [s]) for s in SEQUENCES])
    torch.testing.assert_close(hidden_of(model), separate, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("family", ("llama", "gpt_neox"))  # the second adds both blocks to x
def test_wanted_rows_are_all_that_the_last_mlp_computes(family):
    model, batch = small(family), pack_sequences(SEQUENCES)
    everything, seen = hidden_of(model), []
    for layer in model.backbone.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, out: seen.append(len(inputs[0])))
    wanted = batch.cu_seqlens[1:] - 1
    some = model(batch.token_ids, batch.positions,
                 PackedAttention(batch.cu_seqlens, batch.max_seqlen), wanted)
    torch.testing.assert_close(some, everything[wanted], rtol=1e-6, atol=4e-6)
    assert seen == [len(batch.token_ids), len(SEQUENCES)]


def test_a_window_shorter_than_the_sequence_forgets():
    config = DecoderConfig(family="mistral", **SIZES | {"num_layers": 1}, windows=(3,))
    model = new_decoder(config, seed=0)
    sequence = [5, 7, 46, 9, 33, 3, 8]
    other = [6, *sequence[1:]]  # token 0 differs: tokens 0, 1 and 2 see it, token 3 does not
    same = (hidden_of(model, [sequence]) == hidden_of(model, [other])).all(-1)
    assert same.tolist() == [False, False, False, True, True, True, True]


def test_windows_are_per_layer():
    with pytest.raises(ModelError, match="windows: expected None or 2 entries"):
        DecoderConfig(family="mistral", **SIZES, windows=(3,))
    narrow = new_decoder(DecoderConfig(family="qwen2", **SIZES, windows=(None, 2)), seed=0)
    assert [layer.attention.window for layer in narrow.backbone.layers] == [None, 2]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pages_equal_packed(family):
    """Prefill of the first tokens, then one token at a time, against one packed pass."""
    model = small(family)
    spec, page_size, sequences = model.spec, 4, SEQUENCES[:2]
    pages = torch.full((8, spec.num_layers, 2, page_size, spec.num_kv_heads, spec.head_dim),
                       float("nan"))
    page_table = torch.tensor([[6, 2, 5], [1, 0, 0]])
    expected = hidden_of(model, sequences).split([len(s) for s in sequences])

    def run(chunks: list[tuple[int, int]]) -> torch.Tensor:
        """The tokens [begin, end) of each sequence in one forward pass."""
        tokens = [s[a:b] for s, (a, b) in zip(sequences, chunks, strict=True)]
        batch = pack_sequences(tokens)
        positions = torch.cat([torch.arange(a, b) for a, b in chunks])
        rows = torch.repeat_interleave(torch.arange(2), torch.tensor([len(t) for t in tokens]))
        slots = page_table[rows, positions // page_size] * page_size + positions % page_size
        attention = PagedAttention(
            pages, page_table, slots, batch.cu_seqlens, torch.tensor([b for _, b in chunks]),
            batch.max_seqlen, max(b for _, b in chunks))
        return model(batch.token_ids, positions, attention)

    out = run([(0, 5), (0, 2)])
    torch.testing.assert_close(out, torch.cat([expected[0][:5], expected[1][:2]]), rtol=0,
                               atol=1e-5)
    out = run([(5, 6), (2, 3)])
    torch.testing.assert_close(out, torch.cat([expected[0][5:6], expected[1][2:3]]), rtol=0,
                               atol=1e-5)


def test_gradients_equal_transformers(checkpoint):
    """Qwen3 has every kind of weight: merged QKV and MLP, QK-norm, GQA."""
    made = checkpoint("qwen3")
    model = load_causal_lm(made.folder)
    sequences = [[5, 7, 96, 9, 33, 3], [4, 95, 3]]
    batch = pack_sequences(sequences)
    logits = model.lm_head(hidden_of(model, sequences), F.linear)
    F.cross_entropy(logits, batch.token_ids, reduction="sum").backward()
    made.model.zero_grad()
    for s in sequences:
        ids = torch.tensor([s])
        out = made.model(input_ids=ids, use_cache=False).logits[0]
        F.cross_entropy(out, ids[0], reduction="sum").backward()
    theirs = {name: p.grad for name, p in made.model.named_parameters()}
    layer = "model.layers.1."
    expected = {
        "backbone.embed.weight": theirs["model.embed_tokens.weight"],
        "backbone.layers.1.attention.qkv.weight": torch.cat(
            [theirs[f"{layer}self_attn.{n}_proj.weight"] for n in "qkv"]),
        "backbone.layers.1.attention.q_norm.weight": theirs[f"{layer}self_attn.q_norm.weight"],
        "backbone.layers.1.mlp.up.weight": torch.cat(
            [theirs[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up")]),
        "backbone.layers.1.attention_norm.weight": theirs[f"{layer}input_layernorm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    ours = dict(model.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name].grad, gradient, rtol=1e-4,
                                   atol=1e-5 * float(gradient.abs().max()))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_new_decoder_is_its_seed():
    state = torch.get_rng_state()
    first, second = small(), small()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(),
                                                 strict=True))
    other = new_decoder(first.backbone.config, seed=2)
    assert not torch.equal(first.backbone.embed.weight, other.backbone.embed.weight)


def test_new_decoder_scales():
    config = decoder_config("gpt2", vocab_size=500, hidden_size=64, num_layers=8, num_heads=4,
                            max_positions=64)
    state = new_decoder(config, seed=0).backbone.state_dict()
    assert float(state["embed.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(state["layers.3.attention.qkv.weight"].std()) == pytest.approx(0.02, rel=0.05)
    # 0.02 / sqrt(2 * 8)
    assert float(state["layers.3.mlp.down.weight"].std()) == pytest.approx(0.005, rel=0.05)
    assert float(state["layers.3.attention.out.weight"].std()) == pytest.approx(0.005, rel=0.05)
    assert state["layers.3.mlp_norm.weight"].unique().tolist() == [1.0]
    assert state["layers.3.mlp.down.bias"].unique().tolist() == [0.0]


@pytest.mark.parametrize("tie", [True, False])
def test_deepcopy_keeps_the_tie_and_shares_nothing(tie):
    model = small(tie=tie)
    copied = copy.deepcopy(model)
    assert (copied.lm_head.weight is copied.backbone.embed.weight) == tie
    assert (model.lm_head.weight is model.backbone.embed.weight) == tie
    with torch.no_grad():
        copied.backbone.embed.weight.zero_()
    assert model.backbone.embed.weight.abs().sum() > 0
    assert len(list(model.parameters())) == len(list(copied.parameters()))


def test_residual_dropout_is_for_train_mode_only():
    model = small()
    model.backbone.residual_dropout = 0.5
    plain = hidden_of(model.eval())
    assert torch.equal(hidden_of(model.eval()), plain)
    torch.manual_seed(0)
    assert not torch.allclose(hidden_of(model.train()), plain)
    model.backbone.residual_dropout = 0.0
    assert torch.equal(hidden_of(model.train()), plain)


def test_dropout_acts_on_each_block_and_not_on_the_embedding():
    model = small().train()
    model.backbone.residual_dropout = 1.0  # every block is silent, the embedding is left
    config, ids = model.backbone.config, torch.tensor([5, 7, 9])
    expected = rms_norm(model.backbone.embed(ids), torch.ones(24), epsilon=config.norm_epsilon)
    torch.testing.assert_close(hidden_of(model, [ids.tolist()]), expected)


def test_rotary_frequencies_by_hand():
    base = DecoderConfig(family="llama", **SIZES, rotary_base=10000.0)
    # 10000 ** -(0, 1/4, 1/2, 3/4)
    torch.testing.assert_close(rotary_frequencies(base), torch.tensor([1, 0.1, 0.01, 0.001]))
    linear = DecoderConfig(family="llama", **SIZES,
                           rotary_scaling=RotaryScaling(kind="linear", factor=4.0))
    torch.testing.assert_close(rotary_frequencies(linear),
                               torch.tensor([0.25, 0.025, 0.0025, 0.00025]))
    llama3 = DecoderConfig(family="llama", **SIZES, rotary_scaling=RotaryScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_positions=128))
    # Wavelengths 6.28, 62.8, 628, 6283 against 32 and 128: kept, mixed, divided, divided.
    # Mix: (128 / 62.83 - 1) / 3 = 0.34577, 0.34577 * 0.1 + 0.65423 * 0.0125 = 0.042755.
    torch.testing.assert_close(rotary_frequencies(llama3),
                               torch.tensor([1, 0.042755, 0.00125, 0.000125]),
                               rtol=1e-4, atol=0)


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("has_norms", [True, False])
def test_attention_states_take_merged_projections(turns, has_norms):
    """Both states, against norms and rotation by hand, bit for bit."""
    heads, angles = torch.randn(7, 4 + 2 * 2, 6), torch.rand(7, 1, 2)
    projections = Projections(2, (angles.cos(), angles.sin()) if turns else None,
                              tuple(torch.randn(2, 6)) if has_norms else None, 1e-3)
    query, key, value = heads.split([4, 2, 2], dim=1)
    if has_norms:
        query, key = (rms_norm(x, weight, epsilon=1e-3)
                      for x, weight in zip((query, key), projections.norm_weights, strict=True))
    if turns:
        query, key = rotary(query, key, *projections.cos_sin)
    packed = PackedAttention(torch.tensor([0, 3, 7]), 4)
    results = []
    for function, arguments in ((packed, (query, key, value)),
                                (packed.from_projections, (heads, projections))):
        results.append(function(1, *arguments, scale=0.4, window=3))
    assert torch.equal(*results)
    caches = [torch.zeros(3, 2, 2, 4, 2, 6) for _ in range(2)]
    pageds = [PagedAttention(pages, torch.tensor([[2], [1]]), torch.tensor([8, 9, 10, 4, 5, 6, 7]),
                             torch.tensor([0, 3, 7]), torch.tensor([3, 4]), 4, 4)
              for pages in caches]
    assert torch.equal(pageds[0](1, query, key, value, scale=0.4),
                       pageds[1].from_projections(1, heads, projections, scale=0.4))
    assert torch.equal(*caches)


def test_rotary_frequencies_stay_exact_when_the_model_is_cast():
    rotary = Rotary(DecoderConfig(family="llama", **SIZES, rotary_base=777.0))
    before = rotary.frequencies.clone()
    rotary.to(torch.bfloat16)
    assert rotary.frequencies.dtype == torch.float32
    assert torch.equal(rotary.frequencies, before)
    assert rotary(torch.tensor([3]), torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("num_kv_heads", 2), ("activation", "tanh"), ("rotary_dim", 3),
    ("rotary_dim", 10)])
def test_impossible_decoders(field, value):
    with pytest.raises(ModelError, match=f"^{field}: expected"):
        DecoderConfig(family="llama", **SIZES | {field: value})


def test_decoder_config_refuses_what_the_family_lacks():
    sizes = dict(vocab_size=47, num_layers=2, max_positions=32)
    with pytest.raises(ModelError, match="num_kv_heads: expected 4"):
        decoder_config("gpt2", hidden_size=24, num_heads=4, num_kv_heads=2, **sizes)
    with pytest.raises(ModelError, match="hidden_size: expected a multiple of num_heads"):
        decoder_config("llama", hidden_size=25, num_heads=4, **sizes)


def test_lm_head_hands_its_weight_to_the_op():
    weight, bias = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def op(hidden, given, token, *, bias, scale):
        return hidden @ given.t() * scale + bias + token

    assert LMHead(weight, bias)(torch.ones(1, 2), op, 5, scale=3).tolist() == [[9.0, 10.0]]
    assert LMHead(weight).bias is None


def test_scalar_head_rows_do_not_depend_on_each_other():
    for width in (24, 63, 64, 100, 4096):
        head = ScalarHead(torch.nn.Parameter(torch.randn(width)), bias=0.5)
        hidden = torch.randn(67, width)
        together = head(hidden)
        for count in (1, 2, 3, 8, 33):
            assert torch.equal(head(hidden[:count]), together[:count])
    assert together.dtype == torch.float32
    assert head.to(torch.float64)(hidden.double()).dtype == torch.float64
    assert head.to(torch.bfloat16)(hidden.bfloat16()).dtype == torch.float32


def test_scalar_from_causal():
    model = small()
    scalar = scalar_from_causal(model, seed=3)
    assert torch.equal(scalar.head.weight, scalar_from_causal(model, seed=3).head.weight)
    assert not torch.equal(scalar.head.weight, scalar_from_causal(model, seed=4).head.weight)
    assert float(scalar.head.bias) == 0
    out = hidden_of(scalar)
    assert out.shape == (18,)
    torch.testing.assert_close(out, hidden_of(model) @ scalar.head.weight)
    with torch.no_grad():
        scalar.backbone.embed.weight.zero_()
    assert model.backbone.embed.weight.abs().sum() > 0
    assert hidden_of(scalar_from_causal(model, seed=3, init="zero")).abs().max() == 0
    wide = decoder_config("llama", vocab_size=5, hidden_size=1600, num_layers=1, num_heads=4,
                          max_positions=4, intermediate_size=8)
    # N(0, 1 / (D + 1)) with D = 1600: standard deviation 1 / sqrt(1601)
    weight = scalar_from_causal(new_decoder(wide, 0), 0).head.weight.detach()
    assert float(weight.std()) == pytest.approx(0.024992, rel=0.06)


def test_tokenizer_must_fit():
    spec = ModelSpec(architecture="llama", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
                     hidden_size=2, vocab_size=512, max_positions=8, eos_token_ids=())
    check_tokenizer(spec, 512)
    with pytest.raises(ModelError, match="ids below 512 .* ids up to 512"):
        check_tokenizer(spec, 513)
