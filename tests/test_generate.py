"""fastrl generate: rows that only lack ranks, whatever the number of prompts per call."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastrl.generate as generate_module
from fastrl import cli
from fastrl.config import SamplingConfig
from fastrl.data import load_comparisons, load_encoder, word_tokenizer
from fastrl.engine import Engine
from fastrl.models import DecoderConfig, new_decoder
from fastrl.models.weights import load_causal_lm, save_causal_lm

WORDS = [f"w{i}" for i in range(37)]
PROMPTS = [{"prompt": f"w{i} w{i + 1}", "source": "books", "completion": "not kept"}
           for i in range(5)] + [{"messages": [{"role": "user", "content": "w1 w2"}]}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with a word tokenizer."""
    words = ["Human:", "Assistant:", *WORDS]
    encoder = word_tokenizer(words, tmp_path_factory.mktemp("tokenizer"))
    config = DecoderConfig(family="llama", vocab_size=encoder.max_token_id + 1, hidden_size=16,
                           intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1,
                           head_dim=8, rotary_dim=8, max_positions=64)
    folder = tmp_path_factory.mktemp("model") / "m"
    save_causal_lm(new_decoder(config, seed=0), folder, tokenizer_from=encoder.path)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model: Path, *argv: str) -> int:
    return cli.main(["generate", "--model_name_or_path", str(model), "--max_new_tokens", "6",
                     "--quiet", *argv])


def test_rows_have_everything_but_ranks(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(model, "--prompts", str(prompts), "--num_samples_per_prompt", "3", "--output",
               str(out)) == 0
    rows, encoder = rows_of(out), load_encoder(model)
    assert len(rows) == 6
    assert rows[0]["prompt"] == "w0 w1" and rows[0]["source"] == "books"
    assert set(rows[0]) == {"prompt", "source", "completions"}
    assert rows[5]["messages"] == [{"role": "user", "content": "w1 w2"}]
    for completion in (c for row in rows for c in row["completions"]):
        assert set(completion) == {"text", "token_ids", "logprobs", "finish_reason"}
        assert len(completion["token_ids"]) == len(completion["logprobs"]) <= 6
        assert all(logprob <= 0 for logprob in completion["logprobs"])
        assert completion["finish_reason"] in ("stop", "length")
        ids = [i for i in completion["token_ids"] if i not in encoder.eos_token_ids]
        assert completion["text"] == encoder.decode(ids)
    assert len({c["text"] for c in rows[0]["completions"]}) > 1


def test_rows_say_what_the_engine_said(model: Path, prompts: Path, tmp_path: Path) -> None:
    out, stops = tmp_path / "out.jsonl", tuple(range(5, 9))
    assert run(model, "--prompts", str(prompts), "--num_samples_per_prompt", "3", "--seed", "5",
               "--stop_token_ids", json.dumps(stops), "--output", str(out)) == 0
    encoder = load_encoder(model)
    rollout = Engine(load_causal_lm(model)).generate(
        [encoder.encode_prompt(row["prompt"]) for row in PROMPTS[:5]],
        SamplingConfig(max_new_tokens=6, stop_token_ids=stops), seed=5, num_samples_per_prompt=3)
    assert set(rollout.finish_reasons) == {"stop", "length"}
    completions = [completion for row in rows_of(out)[:5] for completion in row["completions"]]
    assert [c["finish_reason"] for c in completions] == list(rollout.finish_reasons)
    for number, completion in enumerate(completions):
        assert completion["token_ids"] == rollout.response(number)
        count = len(rollout.response(number))
        assert completion["logprobs"] == pytest.approx(
            rollout.rollout_logprobs[number, :count].tolist(), abs=1e-6)


def test_rows_with_ranks_are_comparisons(model: Path, prompts: Path, tmp_path: Path) -> None:
    out, ranked = tmp_path / "out.jsonl", tmp_path / "ranked.jsonl"
    assert run(model, "--prompts", str(prompts), "--num_samples_per_prompt", "3", "--output",
               str(out), "--min_new_tokens", "2") == 0
    rows = rows_of(out)
    for row in rows:
        for rank, completion in enumerate(row["completions"]):
            completion["rank"] = rank
    ranked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparisons, report = load_comparisons(ranked, load_encoder(model), 64)
    assert report.kept == 6
    assert [comparison.ranks for comparison in comparisons] == [(0, 1, 2)] * 6
    encoder = load_encoder(model)
    assert comparisons[0].prompt_ids == tuple(encoder.encode_prompt("w0 w1"))
    for row, comparison in zip(rows, comparisons, strict=True):
        texts = [encoder.decode(ids) for ids in comparison.completions]
        assert texts == [completion["text"] for completion in row["completions"]]


def test_prompts_per_call_do_not_change_the_rows(model: Path, prompts: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--prompts", str(prompts), "--num_samples_per_prompt", "2", "--seed", "5"]
    assert run(model, *arguments, "--output", str(tmp_path / "a.jsonl")) == 0
    monkeypatch.setattr(generate_module, "_prompts_per_call", lambda config: 2)
    assert run(model, *arguments, "--output", str(tmp_path / "b.jsonl")) == 0
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    arguments[-1] = "6"
    assert run(model, *arguments, "--output", str(tmp_path / "c.jsonl")) == 0
    assert (tmp_path / "a.jsonl").read_text() != (tmp_path / "c.jsonl").read_text()


def test_one_prompt_to_standard_output(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--prompt", "w3 w4", "--greedy") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["prompt"] == "w3 w4" and len(row["completions"]) == 1


def test_model_is_a_short_name(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name in ("--model", "--model_name_or_path"):
        assert cli.main(["generate", name, str(model), "--prompt", "w3", "--quiet"]) == 0
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1]
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    assert "--model_name_or_path TEXT, --model TEXT" in capsys.readouterr().out
    assert cli.main(["generate", "--prompt", "w3"]) == 2
    assert "missing 'model_name_or_path'" in capsys.readouterr().err


@pytest.fixture
def readme(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """README.md, in a folder that has the model and the prompts which it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft").mkdir(parents=True)
    (tmp_path / "runs/sft/model").symlink_to(model)
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    return (Path(generate_module.__file__).parents[1] / "README.md").read_text()


def test_the_command_in_the_readme_runs(readme: str) -> None:
    (line,) = re.findall(r"^fastrl (generate .*?)  +#", readme, re.MULTILINE | re.DOTALL)
    assert cli.main(shlex.split(line.replace("\\\n", ""))) == 0
    (row,) = rows_of(Path("to_rank.jsonl"))
    assert len(row["completions"]) == 6


def test_the_three_lines_in_the_readme_run(readme: str) -> None:
    (code,) = re.findall(r"```python\n([^`]*?^engine = .*?)```", readme, re.DOTALL | re.MULTILINE)
    imports, lines = code.split("\n\n")
    assert lines.count("\n") == 3
    assert all(line.startswith("from fastrl.") for line in imports.splitlines())
    names: dict[str, Any] = {}
    exec(code, names)
    tokens, logprobs = names["tokens"], names["logprobs"]
    assert 0 < len(tokens) <= 64 and bool((logprobs[:len(tokens)] < 0).all())
    assert not logprobs[len(tokens):].any()


@pytest.mark.parametrize(("stops", "expected"), [(None, (36,)), ((3,), (3,))])
def test_stop_tokens_that_the_model_lacks_are_left_out_unless_asked_for(
    stops: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    model = SimpleNamespace(spec=SimpleNamespace(eos_token_ids=(36,), vocab_size=37))
    encoder = SimpleNamespace(eos_token_ids=(36, 37))
    config = SamplingConfig(stop_token_ids=stops, top_k=7)
    filled = generate_module.sampling_for(config, model, encoder)
    assert filled == SamplingConfig(stop_token_ids=expected, top_k=7)


def test_progress_goes_beside_the_rows(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model_name_or_path", str(model), "--prompt", "w1",
                     "--max_new_tokens", "3"]) == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "generate 1/1" in captured.err


def test_existing_output_is_left_alone(model: Path, prompts: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert run(model, "--prompts", str(prompts), "--output", str(out)) == 2
    assert out.read_text() == "precious"
    assert "output: expected a new file" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "message"), [
    ([], "prompts: expected either prompt files or one --prompt"),
    (["--prompt", "w1", "--prompts", "p.jsonl"], "prompts: expected either"),
    (["--prompt", "w1", "--num_samples_per_prompt", "0"], "num_samples_per_prompt: expected"),
    (["--prompt", "w1 w2 w3", "--max_prompt_tokens", "2"], "--prompt: expected 1 to 2 tokens, got"),
    (["--prompt", "w1", "--output", "/absent/out.jsonl"], "output: expected a folder at /absent"),
    (["--prompts", "absent.jsonl"], "absent.jsonl"),
    (["--prompt", "w1", "--stop_token_ids", "3", "99999"],
     "stop_token_ids: expected token ids from 0 to"),
    (["--prompt", "w1", "--temperature", "0"], "temperature: expected a number above 0"),
    (["--prompt", "w1", "--temperature", "1e-300"], "temperature: expected at least 1e-6"),
    (["--prompt", "w1", "--stop_token_ids", "-5"], "stop_token_ids: expected token ids of at"),
    (["--prompt", "w1", "--stop_token_ids", "None"], "stop_token_ids"),
])
def test_mistakes(model: Path, argv: list[str], message: str,
                  capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *argv) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_left_when_a_prompt_file_is_broken(model: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    broken.write_text('{"prompt": "w1"}\n{"prompt": 3}\n')
    assert run(model, "--prompts", str(broken), "--output", str(out)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]


def test_rows_are_read_as_the_tokens_that_were_written(shared: Path, tmp_path: Path) -> None:
    """Llama's decoder drops the space that begins a text; a ranking file has to keep it."""
    stories, out = shared / "models/stories260k", tmp_path / "out.jsonl"
    assert run(stories, "--prompt", "Once upon a time.", "--num_samples_per_prompt", "8",
               "--greedy", "--output", str(out)) == 0
    encoder = load_encoder(stories)
    for completion in rows_of(out)[0]["completions"]:
        assert encoder.encode_completion(completion["text"], end=False) == completion["token_ids"]


def test_broken_weights_are_an_error_and_no_rows(model: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    broken = load_causal_lm(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    save_causal_lm(broken, tmp_path / "nan", tokenizer_from=model)
    out = tmp_path / "out.jsonl"
    assert run(tmp_path / "nan", "--prompt", "w1", "--output", str(out)) == 2
    assert "nan: expected finite log-probs, got NaN" in capsys.readouterr().err
    assert not out.exists()
