"""fastrl doctor: the table of operations, and a self check that can fail."""

import io
from pathlib import Path

import pytest
import torch

import fastrl.doctor as doctor
import fastrl.exactness.sweep as sweep_module
from fastrl import cli
from fastrl.console import Console
from fastrl.doctor import (
    DoctorRun,
    SelfCheck,
    examine,
    machine_facts,
    package_rows,
    self_check,
)
from fastrl.models import new_decoder
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm


def test_self_check_generates_and_agrees() -> None:
    check = self_check(torch.device("cpu"))
    assert check.num_tokens == 64  # 2 prompts, 2 samples, 16 tokens: no stop token is defined
    assert 0 <= check.gap <= 1e-5
    assert check.is_passed


@pytest.mark.parametrize(("num_tokens", "gap", "is_passed"), [
    (64, 0.0, True), (64, 9e-5, True), (64, 2e-4, False), (0, 0.0, False),
    (64, float("nan"), False),
])
def test_self_check_fails_when_it_should(num_tokens: int, gap: float, is_passed: bool) -> None:
    assert SelfCheck(num_tokens, gap, 0.1).is_passed is is_passed


def test_report_names_machine_packages_and_operations() -> None:
    out = io.StringIO()
    assert examine(DoctorRun(device="cpu"), Console(file=out, live=False, width=160))
    text = out.getvalue()
    for expected in ("free memory", "C++ compiler", "torch", "transformers", "tensorboard",
                     "sample_tokens", "compute_gae", "chosen", "unavailable", "reason",
                     "the tensors are on cpu",
                     "self check passed: 64 tokens"):
        assert expected in text, expected


def test_packages_that_are_missing_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package-here": "nothing"})
    assert ("no-such-package-here", "not installed", "nothing") in list(package_rows())


def test_a_backend_for_every_operation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_BACKEND", "torch")
    assert dict(machine_facts(torch.device("cpu")))["FASTRL_BACKEND"].startswith("torch, for every")


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "cpu", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("self check passed")
    monkeypatch.setattr(doctor, "self_check", lambda device: SelfCheck(64, 0.5, 0.1))
    assert cli.main(["doctor", "--device", "cpu", "--quiet"]) == 1
    assert "failed (tolerance 0.0001)" in capsys.readouterr().out
    assert cli.main(["doctor", "--device", "cuda:99"]) == 2
    assert "expected one of" in capsys.readouterr().err


def test_the_sweep_of_exact_mode_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_causal_lm(new_decoder(decoder_config(
        "llama", vocab_size=70, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=40,
        max_positions=64), 0), tmp_path / "model")
    command = ["doctor", "--device", "cpu", "--exact", str(tmp_path / "model")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    for expected in ("exact mode of", "in float32", "96 x 32", "packed = prompt = decode step",
                     "passes padded to", "exact mode passed: 11 of 11 lines"):
        assert expected in printed, expected
    assert "self check" not in printed
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0
    assert "in bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(sweep_module, "least_rows", lambda product, dtype, device: None)
    assert cli.main(command) == 1
    assert "exact mode failed: 6 of 11 lines" in capsys.readouterr().out
    assert cli.main(["doctor", "--device", "cpu", "--exact", str(tmp_path / "nothing")]) == 2
