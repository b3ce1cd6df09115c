"""FASTRL_CHECK and FASTRL_LOG: what they switch on, and values that cannot be read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrl import ops
from fastrl.environment import checks_values
from fastrl.errors import ConfigError, NumericsError, ShapeError

NAN = float("nan")
MASK = torch.tensor([[True, True, False]])


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_CHECK", "1")


def rows(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("op", "name", "call"), [
    ("masked_mean", "values", lambda bad: ops.masked_mean(bad, MASK)),
    ("whiten", "values", lambda bad: ops.whiten(bad, MASK)),
    ("kl_estimate", "ref_logprobs", lambda bad: ops.kl_estimate(rows(-1, -2, 0), bad, MASK)),
    ("shape_rewards", "logprobs",
     lambda bad: ops.shape_rewards(torch.ones(1), bad, rows(-1, -2, 0), MASK, kl_coef=0.1)),
    ("compute_gae", "values", lambda bad: ops.compute_gae(rows(0, 1, 0), bad, MASK)),
    ("policy_loss", "advantages",
     lambda bad: ops.policy_loss(rows(-1, -2, 0), rows(-1, -2, 0), bad, MASK)),
    ("ppo_loss", "old_values", lambda bad: ops.ppo_loss(
        *(rows(-1, -2, 0) for _ in range(4)), bad, rows(-1, -2, 0), MASK)),
    ("value_loss", "returns", lambda bad: ops.value_loss(rows(1, 2, 0), rows(1, 2, 0), bad, MASK)),
    ("linear_policy_loss", "hidden", lambda bad: ops.linear_policy_loss(
        bad.T, torch.ones(4, 1), torch.tensor([0, 1, 2]), torch.zeros(3), torch.ones(3), MASK[0],
        denominator=2)),
    ("linear_policy_loss", "advantages", lambda bad: ops.linear_policy_loss(
        torch.ones(3, 1), torch.ones(4, 1), torch.tensor([0, 1, 2]), torch.zeros(3), bad[0],
        MASK[0], denominator=2)),
])
def test_nan_is_named_where_the_mask_is_true(op, name, call, kept, checking, monkeypatch):
    bad = rows(-1, NAN, 0) if kept else rows(-1, -2, NAN)
    if kept:
        with pytest.raises(NumericsError, match=rf"^{op}: expected {name} without NaN, got 1 in "):
            call(bad)
        monkeypatch.setenv("FASTRL_CHECK", "0")
    call(bad)  # off, or masked: nothing is said


@pytest.mark.parametrize(("op", "name", "call"), [
    ("gather_logprobs", "logits",
     lambda: ops.gather_logprobs(rows(0, NAN, 1), torch.tensor([0]))),
    ("linear_logprobs", "weight",
     lambda: ops.linear_logprobs(torch.ones(1, 2), torch.full((3, 2), NAN), torch.tensor([0]))),
    ("linear_logprobs", "bias", lambda: ops.linear_logprobs(
        torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), bias=rows(0, NAN, 0)[0])),
    ("ranking_loss", "scores", lambda: ops.ranking_loss(
        rows(NAN, 0)[0], torch.tensor([0, 1]), torch.tensor([0, 2]))),
    ("shape_rewards", "scores", lambda: ops.shape_rewards(
        torch.tensor([NAN]), rows(0, 0, 0), rows(0, 0, 0), MASK, kl_coef=0.1)),
    ("packed_attention", "value", lambda: ops.packed_attention(
        torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.full((1, 1, 2), NAN),
        torch.tensor([0, 1]), max_seqlen=1, scale=1.0)),
])
def test_nan_is_named_where_everything_counts(op, name, call, checking, monkeypatch):
    with pytest.raises(NumericsError, match=rf"^{op}: expected {name} without NaN"):
        call()
    monkeypatch.delenv("FASTRL_CHECK")
    call()


def test_ids_out_of_range_are_named(checking):
    with pytest.raises(ShapeError, match=r"gather_logprobs: expected token_ids from 0 to 2, got 3 "
                                         r"at \[1\]"):
        ops.gather_logprobs(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ShapeError, match=r"linear_logprobs: expected token_ids from 0 to 3, got -1 "
                                         r"at \[0\]"):
        ops.linear_logprobs(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([-1]))
    key, pages = torch.ones(2, 1, 2), torch.zeros(3, 1, 2, 4, 1, 2)
    ops.write_kv(key, key, pages, 0, torch.tensor([-1, 11]))
    with pytest.raises(ShapeError, match=r"write_kv: expected slot_mapping from -1 to 11, got 12"):
        ops.write_kv(key, key, pages, 0, torch.tensor([0, 12]))


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 4], [0, 2, 1, 3]])
@pytest.mark.parametrize("call", [
    lambda offsets: ops.compute_gae(torch.ones(3), torch.ones(3), cu_seqlens=offsets),
    lambda offsets: ops.ranking_loss(torch.ones(3), torch.tensor([0, 1, 2]), offsets),
    lambda offsets: ops.packed_attention(*3 * [torch.ones(3, 1, 2)], offsets, max_seqlen=4,
                                         scale=1.0),
])
def test_offsets_that_do_not_cover_the_rows_are_named(offsets, call, checking):
    with pytest.raises(ShapeError, match="to rise from 0 to 3, the number of rows, got"):
        call(torch.tensor(offsets))
    call(torch.tensor([0, 1, 1, 3]))


def test_a_compiled_graph_leaves_the_checks_out(checking):
    compiled = torch.compile(lambda x: ops.masked_mean(x, MASK), fullgraph=True, backend="eager")
    assert compiled(rows(1, 3, NAN)).item() == 2


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True)])
def test_values_of_fastrl_check(value, expected, monkeypatch):
    monkeypatch.setenv("FASTRL_CHECK", value)
    assert checks_values() is expected


def run_version(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastrl", "--version"], capture_output=True,
                          text=True, cwd=Path(__file__).parents[1],
                          env={**os.environ, **environment})


@pytest.mark.parametrize(("name", "value", "message"), [
    ("FASTRL_CHECK", "yes", "FASTRL_CHECK: expected 0 or 1, got 'yes'"),
    ("FASTRL_LOG", "loud", "FASTRL_LOG: expected one of debug, info, warning, error, got 'loud'"),
])
def test_unreadable_values_are_errors_of_every_command(name, value, message):
    result = run_version(**{name: value})
    assert result.returncode == 2 and message in result.stderr


def test_unreadable_check_is_an_error_of_every_op(monkeypatch):
    monkeypatch.setenv("FASTRL_CHECK", "true")
    with pytest.raises(ConfigError, match="FASTRL_CHECK: expected 0 or 1, got 'true'"):
        ops.masked_mean(rows(1, 2, 3), MASK)


@pytest.mark.parametrize(("level", "shown"), [("info", ["INFO", "ERROR"]), ("ERROR", ["ERROR"]),
                                              ("", ["ERROR"])])
def test_log_level(level, shown):
    code = ("import logging; from fastrl.environment import set_up_logging; set_up_logging(); "
            "set_up_logging(); log = logging.getLogger('fastrl'); log.info('INFO'); "
            "log.error('ERROR')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True, cwd=Path(__file__).parents[1],
                            env={**os.environ, "FASTRL_LOG": level})
    assert [line.split()[-1] for line in result.stderr.splitlines()] == shown
