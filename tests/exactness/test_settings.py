"""What exact mode sets, that it is put back, and who enters it."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch

from fastrl.backends import choose, prefer
from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.exactness import exact_math, set_workspaces, settings
from fastrl.models import CausalLM, DecoderConfig, new_decoder
from fastrl.stages import inputs

REDUCTIONS = ("_get_cublas_allow_bf16_reduced_precision_reduction",
              "_get_cublas_allow_fp16_reduced_precision_reduction")


@pytest.fixture
def without_blas(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """torch built without CUDA has no cuBLASLt to prefer: its switch is a dictionary here."""
    state = {"library": "default"}

    def library(name: str | None = None) -> str:
        state["library"] = name or state["library"]
        return state["library"]

    first, *rest = settings.ON_A_GPU
    fake = settings.Setting(first.name, first.value, first.reason, library, library)
    monkeypatch.setattr(settings, "ON_A_GPU", (fake, *rest))
    return state


def test_a_gpus_settings_hold_inside_and_are_put_back(without_blas: dict[str, str]) -> None:
    def state() -> tuple[object, ...]:
        return (*(getattr(torch._C, name)() for name in REDUCTIONS),
                torch.get_float32_matmul_precision(), without_blas["library"])

    torch.set_float32_matmul_precision("high")
    try:
        before = state()
        with pytest.raises(ValueError, match="inside"), exact_math("cuda"):
            assert state() == ((False, False), (False, False), "highest", "cublaslt")
            raise ValueError("inside")
        assert state() == before == ((True, True), (True, True), "high", "default")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_off_changes_nothing() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with exact_math("cpu", is_exact=False):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_every_setting_says_why() -> None:
    for setting in (*settings.EVERYWHERE, *settings.ON_A_GPU):
        assert len(setting.reason.split()) > 8, setting.name


def test_attention_and_logprobs_take_one_kernel_first_on_a_gpu(
    without_blas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(kernel: str) -> str:
        return choose(kernel, kernel, ("flash", "torch", "triton"), "cuda", torch.bfloat16)

    kernels = ("packed_attention", "paged_attention", "linear_logprob", "linear_policy_loss")
    assert {chosen(kernel) for kernel in kernels} == {"torch"}
    with exact_math("cuda"):
        assert {chosen(kernel) for kernel in kernels} == {"triton"}
    with prefer({"packed_attention": "cuda"}):  # which has no such kernel
        assert chosen("packed_attention") == "torch"


def test_workspaces_are_set_before_cuda_starts_and_a_users_stay(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in settings.WORKSPACES:
        monkeypatch.setenv(name, "mine")  # put back at the end
    set_workspaces("cuda")
    assert {os.environ[name] for name in settings.WORKSPACES} == {"mine"}
    for name in settings.WORKSPACES:
        monkeypatch.delenv(name)
    set_workspaces("cpu")
    assert not set(settings.WORKSPACES) & set(os.environ)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    set_workspaces("cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLASLT_WORKSPACE_SIZE"] == "1"


def test_too_late_for_workspaces_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in settings.WORKSPACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        set_workspaces("cuda")
    assert "CUBLAS_WORKSPACE_CONFIG=:16:8 CUBLASLT_WORKSPACE_SIZE=1" in caplog.text
    assert not set(settings.WORKSPACES) & set(os.environ)


def _tiny() -> CausalLM:
    return new_decoder(DecoderConfig(
        family="llama", vocab_size=70, hidden_size=24, intermediate_size=40, num_layers=1,
        num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64, rotary_dim=6), 0)


@pytest.mark.parametrize("exact", [True, False])
def test_the_engine_enters_and_leaves_it(exact: bool) -> None:
    model, seen = _tiny(), list[tuple[str, int]]()
    model.backbone.embed.register_forward_hook(
        lambda module, inputs, output: seen.append(
            (torch.get_float32_matmul_precision(), len(output))))
    torch.set_float32_matmul_precision("high")
    try:
        Engine(model, EngineConfig(exact=exact)).generate(
            [[1, 2, 3]], SamplingConfig(max_new_tokens=4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {precision for precision, _ in seen} == {"highest" if exact else "high"}
    if not exact:  # nothing is padded
        assert [rows for _, rows in seen] == [3, 1, 1, 1]
    else:
        assert all(rows >= 4 for _, rows in seen)


@pytest.mark.parametrize(("engine", "expected"), [
    (EngineConfig(), ["cpu"]), (EngineConfig(exact=False), []), (None, [])])
def test_stages_set_workspaces_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, engine: EngineConfig | None, expected: list[str]
) -> None:
    called: list[str] = []
    monkeypatch.setattr(inputs, "set_workspaces", called.append)
    inputs.placement(SimpleNamespace(device="cpu", dtype="auto", engine=engine))
    assert called == expected
