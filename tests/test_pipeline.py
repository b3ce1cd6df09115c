"""Recipes end to end on a model and data made here: order, skipping, lineage and refusals."""

import fcntl
import io
import json
import shutil
from pathlib import Path

import pytest

from fastrl.console import Console
from fastrl.errors import ConfigError, DataError, ModelError
from fastrl.pipeline import run_recipe

RECIPE = """
name: tiny
seed: 3
stages:
  - name: base
    kind: pretrain
    data: [text.txt]
    eval_data: [text.txt]
    vocab_size: 280
    hidden_size: 16
    num_layers: 1
    num_heads: 2
    max_positions: 64
    window_tokens: 32
    batch_size: 4
    max_steps: 2
  - name: sft
    kind: sft
    model_name_or_path: "@base"
    data: [demonstrations.jsonl]
    eval_fraction: 0.25
    ptx_data: [text.txt]
    ptx_window_tokens: 16
    ptx_ratio: 0.5
    batch_size: 2
    max_steps: 2
    eval_steps: 1
    select_by: reward
  - name: reward
    kind: reward
    model_name_or_path: "@sft"
    data: [comparisons.jsonl]
    eval_fraction: 0.25
    demonstrations: [demonstrations.jsonl]
    batch_size: 2
    max_steps: 2
    learning_rate: 1e-3
  - name: best
    kind: select
    model_name_or_path: "@sft"
    reward_model: "@reward"
    prompts: [prompts.jsonl]
    num_prompts: 3
    sampling: {max_new_tokens: 4}
  - name: ppo
    kind: ppo
    model_name_or_path: "@best"
    reward_model: "@reward"
    prompts: [prompts.jsonl]
    source_weights: {a: 3, b: 1}
    eval_fraction: 0.25
    num_iterations: 2
    rollout_batch_size: 4
    minibatch_size: 2
    sampling: {max_new_tokens: 4}
    ptx_data: [text.txt]
    ptx_window_tokens: 16
    ptx_coef: 1.0
    ptx_ratio: 1.0
    eval_steps: 1
    num_eval_prompts: 2
  - name: evaluation
    kind: evaluate
    models: {base: "@base", sft: "@best", ppo: "@ppo"}
    reference: sft
    prompts: [prompts.jsonl]
    reward_model: "@reward"
    text: [text.txt]
    window_tokens: 16
    sampling: {max_new_tokens: 4}
"""
STAGES = ("base", "sft", "reward", "best", "ppo", "evaluation")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(root):
    """A data root with text, demonstrations, comparisons and prompts."""
    root.mkdir()
    (root / "text.txt").write_text("\n\n".join(
        f"The cat number {i} sat on the mat and ate {i} fish." for i in range(40)))
    write_rows(root / "demonstrations.jsonl",
               [{"prompt": f"How many fish? {i}", "completion": f"{i} fish."} for i in range(8)])
    write_rows(root / "comparisons.jsonl",
               [{"prompt": f"Which cat? {i}", "chosen": f"Cat {i}.", "rejected": "No."}
                for i in range(8)])
    write_rows(root / "prompts.jsonl", [{"prompt": f"Who sat? {i}", "source": "ab"[i % 2]}
                                        for i in range(8)])
    return root


class Workplace:
    """A recipe, its data and one output folder."""

    def __init__(self, folder, root=None, output_dir=None):
        self.root = root or make_data(folder / "root")
        self.output_dir = output_dir or folder / "run"
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE)

    def run(self, *overrides, **kwargs):
        """Run the recipe; return what was printed."""
        text = io.StringIO()
        run_recipe(self.recipe, data_root=self.root, output_dir=self.output_dir,
                   overrides=overrides, console=Console(file=text), **kwargs)
        return text.getvalue()

    def files(self):
        """Relative path -> time of change of every file of the run but the report."""
        return {path.relative_to(self.output_dir).as_posix(): path.stat().st_mtime_ns
                for path in self.output_dir.rglob("*")
                if path.is_file() and path.name not in ("report.html", "recipe.json", ".lock")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests that change it work on a copy."""
    place = Workplace(tmp_path_factory.mktemp("pipeline"))
    place.printed = place.run()
    return place


@pytest.fixture
def place(finished, tmp_path):
    """A copy of the finished run."""
    root = shutil.copytree(finished.root, tmp_path / "root")
    output_dir = shutil.copytree(finished.output_dir, tmp_path / "run")
    return Workplace(tmp_path, root, output_dir)


def test_every_stage_runs_and_the_report_is_written(finished):
    for stage in STAGES:
        assert (finished.output_dir / stage / "finished.json").exists()
        assert f"== {stage}" in finished.printed
    for folder in ("base/model", "sft/model", "reward/model", "best/model", "ppo/model",
                   "ppo/last_model"):
        assert (finished.output_dir / folder / "model.safetensors").exists()
        assert (finished.output_dir / folder / "tokenizer.json").exists()
    assert (finished.output_dir / "report.html").stat().st_size <= 1_000_000


def test_lineage_connects_stages_by_hashes(finished):
    runs = {stage: json.loads((finished.output_dir / stage / "run.json").read_text())["lineage"]
            for stage in STAGES}
    assert set(runs["base"]["inputs"]) == {"text.txt"}
    assert set(runs["ppo"]["inputs"]) == {"@best", "@reward", "prompts.jsonl", "text.txt"}
    assert runs["ppo"]["inputs"]["@reward"] == runs["evaluation"]["inputs"]["@reward"]
    assert runs["sft"]["inputs"]["@base"] == runs["evaluation"]["inputs"]["@base"]
    assert runs["ppo"]["config"]["model_name_or_path"] == "@best"
    assert "output_dir" not in runs["ppo"]["config"]
    assert str(finished.root) not in json.dumps(runs)


def test_the_checkpoint_is_selected_again_after_the_reward_stage(finished):
    candidates = finished.output_dir / "sft/candidates"
    chosen = json.loads((finished.output_dir / "best/finished.json").read_text())["summary"]
    assert set(chosen["scores"]) == {"step-1", "step-2"}
    assert chosen["selected"] == max(chosen["scores"], key=chosen["scores"].get)
    weights = [(folder / "model.safetensors").read_bytes()
               for folder in (candidates / chosen["selected"], finished.output_dir / "best/model")]
    assert weights[0] == weights[1]


def test_the_evaluation_compares_with_the_reference(finished):
    result = json.loads((finished.output_dir / "evaluation/evaluation.json").read_text())
    assert result["judge"] == "reward model" and result["num_prompts"] == 8
    assert [(win["model"], win["opponent"]) for win in result["win_rates"]] == [
        ("base", "sft"), ("ppo", "sft")]
    sft = result["models"]["sft"]
    assert sft["kl"]["k1"] == pytest.approx(0, abs=1e-4)  # a model against itself
    assert sft["lm_loss"] > 0 and sft["reward_mean"] == sft["score_mean"]
    assert set(result["samples"][0]["responses"]) == {"base", "sft", "ppo"}


def test_finished_stages_are_skipped_and_nothing_is_touched(place):
    before = place.files()
    printed = place.run()
    assert printed.count("skipped") == len(STAGES)
    assert place.files() == before


def test_an_equal_run_gives_equal_weights_and_metrics(finished, tmp_path):
    again = Workplace(tmp_path, root=finished.root)
    again.run()
    for name in ("base/model/model.safetensors", "best/model/model.safetensors",
                 "reward/model/model.safetensors", "ppo/model/model.safetensors",
                 "ppo/metrics.jsonl", "evaluation/evaluation.json"):
        first, second = ((p.output_dir / name).read_bytes() for p in (finished, again))
        assert first == second, name


def test_a_changed_setting_is_an_error_that_says_how_to_go_on(place):
    before = place.files()
    with pytest.raises(ConfigError, match=r"stage 'ppo' is finished .* kl_coef: 0.02 -> 0.5\. .*"
                                          r"--from_stage ppo"):
        place.run("ppo.kl_coef=0.5")
    assert place.files() == before


def test_changed_data_is_an_error_that_names_the_file(place):
    with (place.root / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "One more?", "source": "a"}\n')
    with pytest.raises(ConfigError, match="stage 'best' is finished .* inputs prompts.jsonl: "):
        place.run()


def test_from_stage_sets_old_folders_aside_and_runs_again(place):
    old = (place.output_dir / "ppo/metrics.jsonl").read_bytes()
    printed = place.run("ppo.kl_coef=0.5", from_stage="ppo")
    assert printed.count("skipped") == 4
    assert (place.output_dir / "ppo.old-1/metrics.jsonl").read_bytes() == old
    assert (place.output_dir / "evaluation.old-1/finished.json").exists()
    assert (place.output_dir / "ppo/metrics.jsonl").read_bytes() != old
    place.run("ppo.kl_coef=0.5", from_stage="evaluation")
    assert (place.output_dir / "evaluation.old-2").is_dir()
    with pytest.raises(ConfigError, match="--from_stage: unknown key 'pop'; did you mean 'ppo'"):
        place.run(from_stage="pop")


def test_an_unfinished_stage_starts_anew_and_its_folder_is_kept(place):
    (place.output_dir / "evaluation/finished.json").unlink()
    printed = place.run()
    assert "an unfinished run was moved to evaluation.interrupted-1" in printed
    assert (place.output_dir / "evaluation.interrupted-1/run.json").exists()
    assert (place.output_dir / "evaluation/finished.json").exists()


@pytest.mark.parametrize("file, row, message", [
    ("comparisons.jsonl", {"prompt": "p", "chosen": "c"}, "line 9, field 'rejected'"),
    ("demonstrations.jsonl", {"prompt": "p", "completion": 3}, "line 9, field 'completion'"),
    ("prompts.jsonl", {"text": "p"}, "line 9, field 'prompt'"),
])
def test_a_broken_row_stops_before_anything_is_written(tmp_path, file, row, message):
    place = Workplace(tmp_path)
    with (place.root / file).open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"{file}, {message}"):
        place.run()
    assert not place.output_dir.exists()


def test_a_missing_file_or_name_stops_before_anything_is_written(tmp_path):
    place = Workplace(tmp_path)
    with pytest.raises(DataError, match="tiny.yaml, stage 'evaluation': text: expected a file or "
                                        "folder, found nothing at .*none.txt"):
        place.run("evaluation.text=[none.txt]")
    with pytest.raises(ConfigError, match="labeler: unknown key 'lexicn'; did you mean 'lexicon'"):
        place.run("evaluation.labeler=lexicn")
    (place.root / "empty_model").mkdir()
    with pytest.raises(ModelError, match="empty_model: expected a model folder with config.json"):
        place.run("ppo.reward_model=empty_model")
    assert not place.output_dir.exists()


def test_an_output_folder_of_something_else_is_refused(place, tmp_path):
    place.recipe.write_text(RECIPE.replace("name: tiny", "name: other"))
    with pytest.raises(ConfigError, match="holds a run of recipe 'tiny', expected 'other'"):
        place.run()
    place.output_dir = tmp_path / "photos"
    place.output_dir.mkdir()
    (place.output_dir / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ConfigError, match="output_dir: expected a new or empty folder"):
        place.run()
    assert [path.name for path in place.output_dir.iterdir()] == ["cat.jpg"]


MALFORMED = [
    ("bad_json", "line 3"), ("missing_field", "line 2"), ("empty_completion", "line 2"),
    ("wrong_types", "line 2"), ("invalid_utf8", "line 2"), ("empty", "at least one row"),
]


@pytest.mark.parametrize("name, message", MALFORMED)
def test_malformed_files_stop_the_recipe_before_any_stage(shared, tmp_path, name, message):
    place = Workplace(tmp_path)
    file = shared / f"data/malformed/{name}.jsonl"
    with pytest.raises(DataError, match=f"{name}.jsonl.*{message}"):
        place.run(f"sft.data=[{file}]")
    assert not place.output_dir.exists()


def test_unusual_files_are_read_and_counted(shared, tmp_path):
    place = Workplace(tmp_path)
    files = [f"{shared}/data/malformed/{name}.jsonl" for name in ("duplicate_rows", "bom_crlf")]
    recipe = RECIPE[:RECIPE.index("  - name: reward")]
    place.recipe.write_text(recipe.replace("select_by: reward", "select_by: last"))
    files.append(f"{shared}/data/malformed/long_prompt.jsonl")
    printed = place.run(f"sft.data=[{', '.join(files)}]", "sft.max_seq_tokens=64",
                        "sft.eval_fraction=0.0")
    # 3 within duplicate_rows; the valid rows of the other files are rows of it, too.
    assert "11 of 12 rows kept, 1 too long, dropped, 8 duplicates" in printed


def test_rankings_without_a_comparison_are_counted(shared, tmp_path):
    place = Workplace(tmp_path)
    file = Path(shared / "data/malformed/ranking_one_completion.jsonl")
    with pytest.raises(DataError, match="ranking_one_completion.jsonl, line 2, field "
                                        "'completions'"):
        place.run(f"reward.data=[{file}]")
    lines = file.read_text().splitlines()
    (place.root / "comparisons.jsonl").write_text("\n".join([lines[0], lines[3]]) + "\n")
    recipe = RECIPE[:RECIPE.index("  - name: best")]
    place.recipe.write_text(recipe.replace("select_by: reward", "select_by: last"))
    printed = place.run("reward.eval_fraction=0.0")
    assert "1 of 2 rows kept, 1 without a comparison, dropped" in printed


def test_two_runs_cannot_share_an_output_folder(place):
    with (place.output_dir / ".lock").open("w") as other_run:
        fcntl.flock(other_run, fcntl.LOCK_EX)
        before = place.files()
        with pytest.raises(ConfigError, match="no other run is using"):
            place.run()
        assert place.files() == before
    assert "skipped" in place.run()
