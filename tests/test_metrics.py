"""The run folder: what is in which file, valid JSON, refusal of used folders, sinks, timers."""

import importlib.util
import json
import math

import pytest
import torch
import yaml

from fastrl.config import PPOConfig, SFTConfig
from fastrl.errors import ConfigError
from fastrl.glossary import GLOSSARY, explain, to_markdown
from fastrl.metrics import PhaseTimer, RunFolder, peak_memory_gib, to_json
from fastrl.ops import masked_mean


def read_lines(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_files_of_a_run(tmp_path):
    path = tmp_path / "runs" / "sft"
    with RunFolder(path, SFTConfig(seed=7), stage="sft", lineage={"data": "abc"}) as run:
        assert yaml.safe_load((path / "config.yaml").read_text())["seed"] == 7
        facts = json.loads((path / "run.json").read_text())
        assert facts["stage"] == "sft" and facts["lineage"] == {"data": "abc"}
        assert facts["versions"]["torch"] and facts["device"]["type"] == "cpu"
        run.update_run({"rows": 3})
        masked_mean(torch.ones(2), torch.ones(2, dtype=torch.bool))
        run.log_samples(1, [{"prompt": "a", "response": "b", "score": 0.5}])
        assert not (path / "finished.json").exists()
        run.finish({"steps": 1})
    facts = json.loads((path / "run.json").read_text())
    assert facts["rows"] == 3 and facts["stage"] == "sft"
    assert facts["backends"]["masked_mean cpu float32"] == "torch"
    assert read_lines(path / "samples.jsonl") == [
        {"step": 1, "prompt": "a", "response": "b", "score": 0.5}]
    finished = json.loads((path / "finished.json").read_text())
    assert finished["summary"] == {"steps": 1} and finished["seconds"] >= 0
    assert run.model_path == path / "model"
    assert not list(path.glob("*.part"))


def test_nested_config_is_saved(tmp_path):
    with RunFolder(tmp_path / "ppo", PPOConfig(), stage="ppo"):
        pass
    saved = yaml.safe_load((tmp_path / "ppo" / "config.yaml").read_text())
    assert saved["sampling"]["temperature"] == 1.0 and saved["report_to"] == []


def test_timing_is_kept_apart_from_deterministic_values(tmp_path):
    with RunFolder(tmp_path, SFTConfig(), stage="sft") as run:
        run.log(1, {"loss/train": 2.0, "time/step_s": 0.1, "throughput/tokens_per_s": 5.0,
                    "memory/peak_gib": 1.0, "memory/max_tokens_per_microbatch": 64.0,
                    "timely/name": 3.0})
        run.log(2, {"time/step_s": 0.2})
        run.log(3, {"loss/train": 1.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss/train": 2.0, "memory/max_tokens_per_microbatch": 64.0,
         "timely/name": 3.0},
        {"step": 3, "loss/train": 1.0}]
    assert read_lines(tmp_path / "timing.jsonl") == [
        {"step": 1, "time/step_s": 0.1, "throughput/tokens_per_s": 5.0, "memory/peak_gib": 1.0},
        {"step": 2, "time/step_s": 0.2}]


def test_what_json_cannot_hold_becomes_null(tmp_path):
    with RunFolder(tmp_path, SFTConfig(), stage="sft") as run:
        run.log(1, {"a/nan": math.nan, "a/inf": math.inf, "a/minus": -math.inf, "a/one": 1.0})
        run.write_json("report.json", {"rows": [math.nan, {"x": (math.inf, 2)}]})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a/nan": None, "a/inf": None, "a/minus": None, "a/one": 1.0}]
    assert json.loads((tmp_path / "report.json").read_text()) == {"rows": [None, {"x": [None, 2]}]}
    assert to_json({"text": "é\n"}) == '{"text": "é\\n"}'


@pytest.mark.parametrize("held, said", [
    ("finished.json", "a finished run"),
    ("run.json", "a run that did not finish"),
    ("thesis.txt", "other files (thesis.txt)"),
])
def test_a_used_folder_is_refused_and_left_alone(tmp_path, held, said):
    (tmp_path / held).write_text("mine")
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path, SFTConfig(), stage="sft")
    assert said in str(error.value) and "choose another output_dir" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [held]
    assert (tmp_path / held).read_text() == "mine"


def test_two_runs_cannot_share_a_folder_and_a_file_is_no_folder(tmp_path):
    RunFolder(tmp_path / "run", SFTConfig(), stage="sft").close()
    with pytest.raises(ConfigError, match="did not finish"):
        RunFolder(tmp_path / "run", SFTConfig(), stage="sft")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder, got the file"):
        RunFolder(tmp_path / "file", SFTConfig(), stage="sft")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_sink(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunFolder(tmp_path, SFTConfig(), stage="sft", report_to=("tensorboard",)) as run:
        run.log(3, {"loss/train": 2.0, "time/step_s": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss/train", "time/step_s"]
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(3, 2.0)]


def test_missing_tensorboard_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("fastrl.metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fastrl-engine\[tensorboard\]'"):
        RunFolder(tmp_path / "run", SFTConfig(), stage="sft", report_to=("tensorboard",))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="expected 'tensorboard', got 'wandb'"):
        RunFolder(tmp_path / "run", SFTConfig(), stage="sft", report_to=("wandb",))


def test_metrics_does_not_import_tensorboard():
    source = importlib.util.find_spec("fastrl.metrics").loader.get_source("fastrl.metrics")
    top = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in top if "tensorboard" in line]


def test_phase_timer_and_memory():
    timer = PhaseTimer()
    with timer.phase("generate"):
        pass
    with timer.phase("generate"):
        pass
    metrics = timer.metrics(num_tokens=10)
    assert set(metrics) == {"time/generate_s", "time/step_s", "throughput/tokens_per_s"}
    assert 0 <= metrics["time/generate_s"] <= metrics["time/step_s"]
    assert 0.01 < peak_memory_gib("cpu") < 1000


def test_every_entry_of_the_glossary_is_one_sentence():
    for name, term in GLOSSARY.items():
        assert term.meaning[0].isupper() and term.meaning.endswith("."), name
        assert ". " not in term.meaning, f"{name}: more than one sentence"
        assert name.count("/") == 1, name
        assert all(": " in peer for peer in term.peers), name


def test_explain_names_the_missing_metric():
    assert explain("loss/train").peers[0] == "TRL: loss"
    assert explain("kl/policy_ref").peers == ("TRL: objective/kl", "OpenRLHF: kl")
    assert explain("clip/fraction").peers == ("TRL: policy/clipfrac_avg",
                                              "verl: actor/pg_clipfrac")
    with pytest.raises(ConfigError, match="'loss/unheard'"):
        explain("loss/unheard")


def test_docs_page_is_the_glossary(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == to_markdown(), (
        "the glossary changed; write docs/metrics.md again: python -c "
        "'from fastrl.glossary import to_markdown; print(to_markdown(), end=str())' "
        "> docs/metrics.md")
