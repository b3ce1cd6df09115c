"""What people see: bars on a terminal, few plain lines elsewhere, and no control characters."""

import io

import pytest

import fastrl.console as console_module
from fastrl.console import Console, format_seconds, headline, printable
from fastrl.glossary import GLOSSARY


def plain(**kwargs: object) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, live=False, **kwargs), out  # type: ignore[arg-type]


def test_headline_shows_what_is_there_in_order() -> None:
    metrics = {"throughput/tokens_per_s": 5230.4, "kl/policy_ref": 1.234, "other/x": 9.0,
               "reward/score_mean": 0.5678}
    assert headline(metrics) == "reward 0.568  KL 1.23  tokens/s 5,230"


def test_every_headline_metric_is_in_the_glossary() -> None:
    assert [name for name, _, _ in console_module.HEADLINES if name not in GLOSSARY] == []


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0.0s"), (4.24, "4.2s"), (65, "1:05"), (7209, "2:00:09"), (59.99, "60.0s"),
])
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_control_characters_become_visible() -> None:
    assert printable("a\tb\nc\x1b[2Jd\x00\x9b\u202e") == "a\tb\nc\\x1b[2Jd\\x00\\x9b\\u202e"


def test_plain_progress_is_a_line_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    console, out = plain()
    with console.progress("ppo", 1000) as progress:
        for step in range(1, 13):
            now[0] += 1.0
            progress.update(step, {"kl/policy_ref": step / 10})
    assert out.getvalue() == ("ppo 5/1000  KL 0.50  left 16:35\n"
                              "ppo 10/1000  KL 1.00  left 16:30\n")


def test_plain_progress_is_a_line_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    console, out = plain()
    with console.progress("sft", 20) as progress:
        for step in range(1, 21):
            now[0] += 0.75
            progress.update(step, {})
    lines = out.getvalue().splitlines()
    assert lines[0] == "sft 2/20  left 13.5s"
    assert lines[-1] == "sft 20/20  took 15.0s"
    assert len(lines) == 10


def test_fast_stage_prints_its_last_line_only() -> None:
    console, out = plain()
    with console.progress("sft", 300) as progress:
        for step in range(1, 301):
            progress.update(step, {"loss/train": 1.0})
    assert out.getvalue() == "sft 300/300  loss 1.0000  took 0.0s\n"


def test_live_bar_shows_numbers() -> None:
    out = io.StringIO()
    console = Console(file=out, live=True, width=120)
    with console.progress("ppo", 10) as progress:
        progress.update(10, {"reward/score_mean": 0.25})
    assert "10/10" in out.getvalue() and "reward 0.250" in out.getvalue()


def test_samples_side_by_side_and_stacked() -> None:
    answers = {"base": ["see page [two]"], "ppo": ["it eats\x1b[31m"]}
    out = io.StringIO()
    Console(file=out, live=True, width=120).samples("answers", ["a fox?"], answers)
    row = next(line for line in out.getvalue().splitlines() if "a fox?" in line)
    assert row.index("a fox?") < row.index("see page [two]") < row.index("it eats\\x1b[31m")
    console, out = plain()
    console.samples("answers", ["a fox?"], answers)
    assert out.getvalue().splitlines() == [
        "answers", "  prompt  a fox?", "  base    see page [two]", "  ppo     it eats\\x1b[31m", ""]


def test_tables_align_numbers() -> None:
    console, out = plain()
    console.table("wins", ["model", "rate"], [("ppo", 0.71234), ("[sft]", 0.5)])
    text = out.getvalue()
    assert "wins" in text and "0.712" in text and "[sft]" in text


def test_stage_headers_and_explanations() -> None:
    console, out = plain()
    console.stage("ppo", "policy against reward model")
    console.explain(["kl/policy_ref"])
    assert out.getvalue().startswith("== ppo: policy against reward model\nwhat the numbers mean\n")
    assert GLOSSARY["kl/policy_ref"].meaning in out.getvalue().replace("\n", " ")


def test_quiet_leaves_warnings_and_results() -> None:
    console, out = plain(quiet=True)
    console.stage("ppo")
    console.print("info")
    console.table("t", ["a"], [(1,)])
    console.samples("s", ["p"], {"m": ["x"]})
    console.explain(["kl/policy_ref"])
    with console.progress("ppo", 1) as progress:
        progress.update(1, {})
    console.warning("careful\x07")
    console.result("report  x.html")
    assert out.getvalue() == "warning: careful\\x07\nreport  x.html\n"
