"""The sweep: what it finds in order on this machine, and that it sees each kind of failure."""

import logging
from typing import Any

import pytest
import torch

import fastrl.exactness.attention as attention_module
import fastrl.exactness.sweep as sweep_module
from fastrl.exactness import rows
from fastrl.exactness.rows import Product, products
from fastrl.exactness.sweep import SweepLine, sweep, warn_of_failures
from fastrl.models import CausalLM, new_decoder
from fastrl.models.families import decoder_config


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> CausalLM:
    return new_decoder(decoder_config(
        family, vocab_size=70, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=40,
        max_positions=64), 0, dtype=dtype)


def line(lines: list[SweepLine], work: str) -> SweepLine:
    (found,) = [one for one in lines if one.work == work]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2", "gpt_neox"])
def test_every_family_passes_on_a_cpu(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    lines = sweep(model)
    *matrices, head = products(model)
    assert [one.shape for one in lines if one.work == "product"] == [
        matrix.shape for matrix in matrices]
    assert line(lines, "logits").shape == head.shape == "70 x 32"
    assert [one.work for one in lines if one.work != "product"] == [
        "logits", "norm", "mlp", *(["rotary"] if family != "gpt2" else []), "attention", "prefixes",
        "LM head"]
    assert [one for one in lines if not one.is_exact] == []
    assert line(lines, "attention").result == "packed = prompt = decode step"


def test_a_product_that_never_agrees_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "least_rows",
                        lambda product, dtype, device: None if product == (80, 32, False) else 5)
    failed = [one for one in sweep(tiny()) if not one.is_exact]
    assert [(one.work, one.shape) for one in failed] == [("product", "80 x 32")]
    assert "recomputed" in failed[0].used
    assert "passes padded to 5 rows" in {one.used for one in sweep(tiny())}


def test_a_row_kernel_that_looks_at_other_rows_is_seen() -> None:
    model = tiny()
    model.backbone.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + output.mean())
    found = line(sweep(model), "mlp")
    assert not found.is_exact and "other bits with" in found.result
    model = tiny()
    model.backbone.layers[0].attention_norm.register_forward_hook(
        lambda module, inputs, output: (output[0] * (1 + len(output[0])), output[1]))
    assert not line(sweep(model), "norm").is_exact


@pytest.mark.parametrize("path", ["prompt", "decode step"])
def test_pages_that_give_other_bits_are_seen(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    real = attention_module.paged_attention

    def other(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_decode = kwargs["max_seqlen_q"] == 1
        out = real(query, *args, **kwargs)
        return out * (1 + 1e-6) if is_decode == (path == "decode step") else out

    monkeypatch.setattr(attention_module, "paged_attention", other)
    found = line(sweep(tiny()), "attention")
    assert not found.is_exact and f"{path} of 100" in found.result


@pytest.mark.parametrize(("op", "path"), [
    ("prefix_attention", "pack"), ("paged_attention", "decode step")])
def test_a_shared_prompt_with_other_bits_is_seen_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, op: str, path: str
) -> None:
    real = getattr(attention_module, op)

    def other(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(query, *args, **kwargs)
        is_shared = op == "prefix_attention" or kwargs["prefixes"] is not None
        out[-1] *= 1 + 1e-6 * is_shared  # the last token of the last response alone
        return out

    monkeypatch.setattr(attention_module, op, other)
    failed = [one for one in sweep(tiny("mistral")) if not one.is_exact]
    assert [one.work for one in failed] == ["prefixes"]
    assert failed[0].result == "other bits than packed: " + ", ".join(
        f"{path} of {name}" for name in ("2 after 16", "3 after 70", "2 after 160"))


def test_decode_steps_of_the_sweep_read_what_they_share_once(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages that are not the first sequence's are never asked for."""
    real, given = attention_module.paged_attention, []

    def noted(query: torch.Tensor, pages: torch.Tensor, layer: int, table: torch.Tensor,
              *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs["prefixes"] is not None:
            given.append((table, kwargs["prefixes"]))
        return real(query, pages, layer, table, *args, **kwargs)

    monkeypatch.setattr(attention_module, "paged_attention", noted)
    sweep(tiny())
    assert [p.groups.tolist() for _, p in given] == [[[0, 2]], [[0, 3]], [[0, 2]]]
    for (table, prefixes), tokens in zip(given, (16, 64, 160), strict=True):
        assert prefixes.shared_lens.tolist() == [tokens] * len(table)
        shared = table[:, : tokens // attention_module.PAGE_SIZE]
        assert torch.equal(shared, shared[:1].expand_as(shared))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_pages_with_other_keys_are_seen(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    real = sweep_module.rotary_write_kv

    def other(heads: torch.Tensor, pages: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query = real(heads, pages, *args, **kwargs)
        pages[:, :, 0] *= 1 + 1e-6
        return query

    monkeypatch.setattr(sweep_module, "rotary_write_kv", other)
    found = line(sweep(tiny(family)), "rotary")
    assert not found.is_exact and "pages are written" in found.result


def test_a_sampler_with_other_logprobs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sweep_module.sample_tokens
    monkeypatch.setattr(sweep_module, "sample_tokens", lambda *args, **kwargs: (
        real(*args, **kwargs)._replace(logprobs=real(*args, **kwargs).logprobs + 1)))
    found = line(sweep(tiny()), "LM head")
    assert not found.is_exact and "differ by 1.0e+00" in found.result


def test_what_there_is_no_time_for_is_not_called_exact() -> None:
    lines = sweep(tiny(), max_seconds=-1)
    assert {one.work for one in lines} == {"not tried"} and not any(o.is_exact for o in lines)


def test_start_up_says_what_fails_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        warn_of_failures(tiny())
        assert not caplog.records
        monkeypatch.setattr(sweep_module, "sweep", lambda model: [
            SweepLine("norm", "rows of 32", "equal", "nothing to do", True),
            SweepLine("attention", "4 heads", "other bits", "recomputed", False)])
        warn_of_failures(tiny())
    (record,) = caplog.records
    assert record.getMessage().startswith("exact mode: attention, 4 heads: other bits; recomputed")


def test_a_gpus_counts_are_compared_with_the_most_that_fit(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, whose products of one thread agree from a few rows on."""
    counts: list[int] = []
    real = torch.nn.functional.linear

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return real(x, weight)

    monkeypatch.setattr(rows.F, "linear", noted)
    find = rows.smallest_invariant_rows_on_gpu.__wrapped__
    least = find(Product(40, 32), torch.float32, torch.device("cpu"))
    assert least == rows.smallest_invariant_rows((40, 32), torch.float32, 1)
    assert max(counts) == 8192 and {64, 63, 2048} <= set(counts)
    counts.clear()
    monkeypatch.setattr(rows, "MAX_RESULT_BYTES", 40 * 4 * 300)
    find(Product(40, 32), torch.float32, torch.device("cpu"))
    assert counts[0] == 300 and max(counts[1:]) == 256
    monkeypatch.setattr(rows.F, "linear", lambda x, weight: real(x, weight) + len(x))
    assert find(Product(40, 32), torch.float32, torch.device("cpu")) is None
