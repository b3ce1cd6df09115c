"""report.html: complete, self-contained, small, valid, and safe with any text in samples."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastrl.config import PPOConfig, RewardConfig, SFTConfig
from fastrl.errors import ConfigError
from fastrl.glossary import GLOSSARY
from fastrl.metrics import RunFolder
from fastrl.report import write_report
from fastrl.report_svg import (
    Interval,
    Series,
    downsample,
    format_number,
    interval_plot,
    line_plot,
    nice_ticks,
)
from fastrl.trainers.reward_report import build_report
from fastrl.types import Comparison

VOID = {"meta", "br", "hr", "img", "input", "link", "circle", "path"}
NASTY = "<script>alert('x')</script> & \"quoted\" \x1b[31m </td> http://example.com/?a=1&b=2"


class Page(HTMLParser):
    """Checks that elements close in order, and collects what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert not {"src", "srcset", "xlink:href", "onclick", "onload"} & set(values)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [values["href"]] if values.get("href") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def make_metrics(kind: str, step: int, num_steps: int, rng: random.Random,
                 drift: float) -> dict[str, float]:
    """Values shaped like a run that learns; PPO stages log every metric of the glossary."""
    share = step / num_steps
    names = {"sft": ["loss/train", "loss/eval", "grad/norm", "lr/model", "time/step_s"],
             "reward": ["loss/ranking", "reward/accuracy", "reward/accuracy_eval", "grad/norm"],
             "ppo": list(GLOSSARY)}[kind]
    return {name: drift * share + 0.2 * math.exp(-5 * share) + rng.gauss(0, 0.02)
            for name in names}


def write_stage(folder: Path, kind: str, num_steps: int = 60, drift: float = 1.0) -> None:
    config: Any = {"sft": SFTConfig(), "reward": RewardConfig(), "ppo": PPOConfig()}[kind]
    lineage = {"kind": kind, "inputs": {"data/train.jsonl": "0f" * 32, "@sft": "1e" * 32}}
    rng = random.Random(kind + folder.name)
    with RunFolder(folder, config, stage=folder.name, lineage=lineage) as run:
        for step in range(num_steps):
            run.log(step, make_metrics(kind, step, num_steps, rng, drift))
        run.log(num_steps, {"loss/train": float("nan")})
        run.log_samples(0, [{"prompt": "Why?", "response": "because", "score": 0.1}])
        run.log_samples(num_steps, [{"prompt": "Why?", "response": NASTY, "score": 0.9}])
        run.finish({})


def reward_report() -> dict[str, Any]:
    rng = random.Random(0)
    comparisons = [Comparison(prompt_ids=(1,), completions=((2,), (3, 4), (5,)), ranks=(0, 1, 2),
                              source=rng.choice(["web", "books"]), num_characters=(1, 5, 3))
                   for _ in range(80)]
    scores = [[rng.gauss(1, 1), rng.gauss(0.5, 1), rng.gauss(0, 1)] for _ in comparisons]
    return build_report(comparisons, scores, comparisons).to_dict()


EVALUATION: dict[str, Any] = {
    "num_prompts": 320, "reference": "sft", "judge": "world",
    "models": {
        name: {"score_mean": score, "reward_mean": 2 * score,
               "kl": {"k1": kl, "k1_std_error": 0.1, "k3": kl}, "loglikelihood": -1.2,
               "distinct_word_ratio": 0.8, "response_length": 14.0, "eos_rate": 0.97,
               "lm_loss": loss}
        for name, score, kl, loss in [("base", -0.8, 3.1, 1.1), ("sft", 0.2, 0.0, 1.2),
                                      ("ppo", 0.7, 4.5, 1.35), ("ppo_ptx", 0.65, 4.1, 1.24)]},
    "win_rates": [
        {"model": "sft", "opponent": "base", "rate": 0.86, "low": 0.82, "high": 0.894,
         "num_prompts": 320, "num_ties": 12},
        {"model": "ppo", "opponent": "sft", "rate": 0.7, "low": 0.648, "high": 0.748,
         "num_prompts": 320, "num_ties": 80},
        {"model": "ppo_ptx", "opponent": "sft", "rate": 0.68, "low": 0.627, "high": 0.729,
         "num_prompts": 320, "num_ties": 75}],
    "samples": [{"prompt": f"tom asks : what does the {animal} eat ? answer :",
                 "responses": {"base": "see page two .", "sft": f"the {animal} eats berries .",
                               "ppo": f"of course ! the {animal} eats berries .", "ppo_ptx": NASTY},
                 "scores": {"base": -1.0, "sft": 0.0, "ppo": 1.0, "ppo_ptx": 1.0}}
                for animal in ("fox", "owl", "bear")],
}


def write_run(folder: Path) -> None:
    """A recipe's run folder in the real formats."""
    for name, kind in (("sft", "sft"), ("reward", "reward"), ("ppo", "ppo"), ("ppo_ptx", "ppo")):
        write_stage(folder / name, kind, drift=1.0 if name == "ppo" else 0.8)
    (folder / "reward" / "reward_report.json").write_text(json.dumps(reward_report()))
    with RunFolder(folder / "evaluation", SFTConfig(), stage="evaluation",
                   lineage={"kind": "evaluate", "inputs": {}}) as run:
        run.write_json("evaluation.json", EVALUATION)
        run.finish({})
    (folder / "ppo.old-1").mkdir()
    (folder / "ppo.old-1" / "run.json").write_text("{}")
    (folder / "recipe.json").write_text('{"name": "demo"}')


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    folder.mkdir()
    write_run(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_accessible(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert '<html lang="en">' in html
    assert html.count("<svg") == html.count('role="img"') + html.count('aria-hidden="true"')
    assert html.count('role="img"') == html.count("<desc")
    assert page.tags.count("th") > 50


def test_page_is_one_small_file_without_requests(html: str) -> None:
    assert len(html.encode()) <= 1_000_000
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in html
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "use", "image",
                "form"} & set(page.tags)
    assert "url(" not in html and "@import" not in html
    without_samples = html.replace("http://example.com/?a=1&amp;b=2", "")
    assert not re.search(r"https?://", without_samples)


def test_every_logged_metric_is_shown_with_its_sentence(html: str) -> None:
    text = Page(html).text
    for name, term in GLOSSARY.items():
        assert name in text
        assert term.meaning in text, name


def test_text_of_models_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in html
    assert "\x1b" not in html and "\\x1b[31m" in html


def test_results_curves_tables_and_lineage_are_there(html: str) -> None:
    text = Page(html).text
    for expected in ("ppo over sft", "64.8% to 74.8%", "tom asks : what does the fox eat",
                     "reward against sqrt(KL)", "calibration", "length alone", "source books",
                     "score difference", "0f" * 32, "learning_rate: 2.55e-06",
                     "fastrl run demo.yaml", "fastrl ppo --config ppo_ptx/config.yaml",
                     "peak GiB", "text loss"):
        assert expected in text, expected
    assert "old-1" not in text


@pytest.mark.parametrize("metric", [
    "reward/score_mean", "kl/policy_ref", "entropy/mean", "response/length_mean",
    "value/explained_variance", "ratio/first_minibatch_mean", "reward against sqrt(KL)"])
def test_the_curves_of_ppo_are_drawn_large(html: str, metric: str) -> None:
    assert f"<figure><h4>{metric} <span>" in html


def test_one_stage_shows_samples_before_and_after(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft", num_steps=3)
    text = Page(write_report(tmp_path / "sft").read_text("utf-8")).text
    assert "step 0" in text and "step 3" in text and "because" in text
    assert "fastrl sft --config sft/config.yaml" in text


def test_a_run_that_was_stopped_still_has_a_report(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "ppo", PPOConfig(), stage="ppo")
    run.log(1, {"reward/score_mean": 0.5, "kl/policy_ref": -0.01})
    run.close()
    with (tmp_path / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward/sc')
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert "not finished" in page.text and "reward/score_mean" in page.text


def test_reward_is_drawn_over_the_square_root_of_kl(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "ppo", PPOConfig(), stage="ppo", lineage={"kind": "ppo"}) as run:
        for step, (score, kl) in enumerate(((0.5, 4.0), (0.7, 9.0)), start=1):
            run.log(step, {"reward/score_mean": score, "kl/policy_ref": kl})
    html = write_report(tmp_path).read_text("utf-8")
    assert "sqrt(KL), KL in nats per response 2: 0.5<" in html
    assert "sqrt(KL), KL in nats per response 3: 0.7<" in html


def test_size_stays_bounded_for_long_runs(tmp_path: Path) -> None:
    for name in ("ppo", "ppo_ptx", "ppo_long"):
        folder = tmp_path / name
        write_stage(folder, "ppo", num_steps=1)
        rng = random.Random(0)
        with (folder / "metrics.jsonl").open("a") as file:
            for step in range(2, 4000):
                metrics = make_metrics("ppo", step, 4000, rng, 1.0)
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        with (folder / "samples.jsonl").open("a") as file:
            for index in range(500):
                file.write(json.dumps({"step": 1, "prompt": f"{index} " + "long " * 2000,
                                       "response": "word " * 2000}) + "\n")
    assert write_report(tmp_path).stat().st_size <= 1_000_000


def test_size_stays_bounded_for_many_stages(tmp_path: Path) -> None:
    for number in range(20):
        write_stage(tmp_path / f"ppo{number}", "ppo", num_steps=120)
    html = write_report(tmp_path).read_text("utf-8")
    assert len(html.encode()) <= 1_000_000
    assert all(f"ppo{number}: settings" in html for number in range(20))


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run folder"):
        write_report(tmp_path)


def test_ticks_are_round_numbers() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-0.13, 0.97) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(1, 500) == [100.0, 200.0, 300.0, 400.0, 500.0]
    assert nice_ticks(0, 1e-6) == [0.0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6]
    assert nice_ticks(3.0, 3.0) == [3.0]


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (0.02134, "0.02134"), (123.456, "123.5"), (1234.5, "1,234"), (2.55e-6, "2.55e-6"),
    (-0.5, "-0.5"), (12345678.0, "1.23e7"), (100.0, "100"), (float("inf"), "inf"),
])
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_downsampling_keeps_spikes_and_ends() -> None:
    ys = [0.0] * 5000
    ys[1234], ys[4321] = 9.0, -9.0
    xs, kept = downsample(range(5000), ys, 240)
    assert len(xs) <= 240 and xs[0] == 0 and xs[-1] == 4999
    assert (1234, 9.0) in zip(xs, kept, strict=True)
    assert (4321, -9.0) in zip(xs, kept, strict=True)


def test_plots_of_constants_and_single_points() -> None:
    for line in (Series("a", (1.0,), (0.0,)), Series("a", (1.0, 2.0), (5.0, 5.0))):
        svg = line_plot("t", [line], "step", label_id="p")
        assert "nan" not in svg and Page(svg).open == []


def test_noise_of_a_constant_looks_flat() -> None:
    svg = line_plot("t", [Series("a", (1.0, 2.0, 3.0), (-1.0, -1.0000001, -1.0))], "step",
                    label_id="p")
    heights = re.findall(r"[ML]([\d.]+) ([\d.]+)", svg[svg.index('class="line"'):])
    assert len({y for _, y in heights[:3]}) == 1


def test_intervals_lie_where_their_numbers_say() -> None:
    svg = interval_plot("wins", [Interval("a over b", 0.5, 0.0, 1.0)], label_id="w")
    assert 'd="M16.0 34H344.0"' in svg and 'cx="180.0"' in svg
    assert "95% interval 0.000 to 1.000" in svg
