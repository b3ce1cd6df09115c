"""The benchmark of the engine beside transformers, from end to end at tiny sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_generate

TINY = {"B": 4, "P": 5, "V": 64, "D": 48, "L": 1}


def test_the_file_has_ratios_for_every_case_and_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["bench_generate", "--threads", "1", "2", "--out",
                                     str(tmp_path)])
    for name, value in {"SIZES": TINY, "EQUAL_TOKENS": 3, "MIXED_TOKENS": (2, 5),
                        "TRIAL_TOKENS": 2, "ROUNDS": {"equal": 2, "mixed": 1}}.items():
        monkeypatch.setattr(bench_generate, name, value)
    num_threads = torch.get_num_threads()
    try:
        assert bench_generate.main() == 0
    finally:
        torch.set_num_threads(num_threads)
    (path,) = tmp_path.glob("generate_cpu_*.json")
    document = json.loads(path.read_text())
    rows = {(row["case"], row["extra"]["num_threads"], row["provider"]): row
            for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 16
    for (case, threads, provider), row in rows.items():
        extra, theirs = row["extra"], rows[case, threads, "transformers"]["extra"]
        assert extra["tokens"] == {"equal": 12, "mixed": 14}[case]
        plain = rows[case, threads, "transformers_plain"]["extra"]
        assert theirs["ratio"] == 1 and theirs["variant"] in bench_generate.VARIANTS
        assert plain["ratio_to_transformers_plain"] == 1 and plain["variant"] == "plain"
        for name in ("ratio", "processor_ratio"):
            assert len(extra[f"{name}s_to_transformers_plain"]) == row["rounds"]
        assert len(extra["ratios"]) == row["rounds"] == bench_generate.ROUNDS[case]
        assert row["status"] == "ok" and row["median_s"] > 0 and extra["processor_ratio"] > 0
        assert provider in ("fastrl", "fastrl_free", "transformers", "transformers_plain")
    printed = capsys.readouterr().out
    assert "equal, 2 threads, fastrl: " in printed and "(goal 2.0)" in printed
    assert "mixed, 1 thread, fastrl_free: " in printed and "(goal 3.0)" in printed


def test_a_plain_call_leaves_attention_and_cache_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(bench_generate, "SIZES", TINY)
    bench_generate.make_checkpoint(tmp_path)
    caches = []
    generate = transformers.LlamaForCausalLM.generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = generate(self, *args, return_dict_in_generate=True, **kwargs)
        caches.append((self.config._attn_implementation,
                       type(out.past_key_values.layers[0]).__name__))
        return out.sequences

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", watched)
    for variant in ("plain", "sdpa_static", "eager"):
        bench_generate.transformers_call(tmp_path, [2] * TINY["B"], variant)()
    assert caches == [("sdpa", "DynamicLayer"), ("sdpa", "StaticLayer"), ("eager", "DynamicLayer")]


def test_the_fastest_variant_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"sdpa": 3.0, "eager": 2.0, "sdpa_static": 4.0}
    monkeypatch.setattr(bench_generate, "transformers_call", lambda path, wanted, variant: variant)
    monkeypatch.setattr(bench_generate, "processor_seconds", seconds.__getitem__)
    assert bench_generate.fastest_variant(Path(), 1) == ("eager", seconds)
