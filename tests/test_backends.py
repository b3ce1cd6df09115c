"""Choice of a backend: order of decision, refusals, logging, and the doctor's table."""

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from fastrl import backends, ops
from fastrl.backends import backend_table, choose, chosen_backends, use_backend
from fastrl.errors import BackendUnavailableError, ConfigError


def pick(backend: str | None = None, preference: tuple[str, ...] = ("torch",), **changes) -> str:
    arguments = {"op": "compute_gae", "kernel": "gae", "device_type": "cpu",
                 "dtype": torch.float32, **changes}
    return choose(preference=preference, backend=backend, **arguments)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A Triton kernel file for an op of its own, refusing float64, as a later version adds them."""
    module = ModuleType("fastrl_kernels.triton.made_up")
    module.supports = lambda device_type, dtype: (  # type: ignore[attr-defined]
        "float64 is not supported" if dtype == torch.float64 else None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backends._refusal.cache_clear()
    yield module
    backends._refusal.cache_clear()


def pick_made_up(backend: str | None = None, **changes) -> str:
    return pick(backend, ("triton", "torch"), op="made_up_op", kernel="made_up", **changes)


def test_torch_is_always_there() -> None:
    assert pick() == pick("auto") == pick("torch") == "torch"


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match="'cuda'"):
        pick()
    with use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match="'triton'"):
            pick()
        assert pick("torch") == "torch"
        with use_backend("auto"):
            assert pick() == "torch"
        with pytest.raises(BackendUnavailableError, match="'triton'"):
            pick()
    monkeypatch.setenv("FASTRL_BACKEND", "")
    assert pick() == "torch"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_named_backend_never_falls_back(backend: str) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        pick(backend)
    message = str(caught.value)
    assert message == (f"compute_gae: backend '{backend}' cannot run here: this version has no "
                       f"{backend} kernel for it. Use a backend that would work: torch.")


def test_a_name_for_every_operation_says_where_it_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTRL_BACKEND", "triton")
    with pytest.raises(BackendUnavailableError, match="FASTRL_BACKEND asks it of every operation"):
        pick()
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="use_backend asks it"):
        pick()


def test_unknown_names_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="backend: expected one of auto, cuda, triton, torch"):
        pick("numba")
    with pytest.raises(ConfigError, match="use_backend"), use_backend("numba"):
        pass
    monkeypatch.setenv("FASTRL_BACKEND", "fast")
    with pytest.raises(ConfigError, match="FASTRL_BACKEND.*'fast'"):
        pick()


def test_a_missing_package_is_named_with_its_remedy(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = backends.importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec",
                        lambda name: None if name == "triton" else find_spec(name))
    with pytest.raises(BackendUnavailableError, match="package triton is not installed. Install "
                                                      "triton .*, or use .* work: torch"):
        pick_made_up("triton", device_type="cuda")
    with pytest.raises(BackendUnavailableError, match="fastrl_kernels._C is not built. Build it "
                                                      "with FASTRL_BUILD_CUDA=1"):
        pick("cuda", ("cuda", "torch"), device_type="cuda")


def test_auto_takes_the_first_that_supports_device_and_dtype(kernel: ModuleType) -> None:
    assert pick_made_up(device_type="cuda") == "triton"
    assert pick_made_up(device_type="cuda", dtype=torch.float64) == "torch"
    assert pick_made_up(device_type="cpu") == "torch"
    with pytest.raises(BackendUnavailableError, match="float64 is not supported"):
        pick_made_up("triton", device_type="cuda", dtype=torch.float64)


def test_cpu_tensors_get_triton_only_by_name_and_interpreted(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendUnavailableError, match="the tensors are on cpu"):
        pick_made_up("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert pick_made_up("triton") == "triton"
    assert pick_made_up() == "torch"
    with pytest.raises(BackendUnavailableError, match="the tensors are on meta"):
        pick_made_up("triton", device_type="meta")


def test_sizes_can_rule_a_backend_out(kernel: ModuleType) -> None:
    limits = (("triton", "it takes at most 8 channels, these have 9"),)
    assert pick_made_up(device_type="cuda", limits=limits) == "torch"
    assert pick_made_up("torch", device_type="cuda", limits=limits) == "torch"
    with pytest.raises(BackendUnavailableError, match="triton' cannot run here: it takes at most 8 "
                                                      "channels, these have 9. .* work: torch"):
        pick_made_up("triton", device_type="cuda", limits=limits)


def test_a_library_is_named_when_it_is_not_installed() -> None:
    with pytest.raises(BackendUnavailableError, match="package flash_attn is not installed. "
                                                      "Install fastrl with the flash-attn extra"):
        pick("flash", ("flash", "torch"), kernel="packed_attention", device_type="cuda")
    with pytest.raises(BackendUnavailableError, match="this version has no flash kernel for it"):
        pick("flash")


def test_auto_logs_once_and_warns_where_a_gpu_gets_the_slow_path(
    kernel: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_chosen", {})
    with caplog.at_level(logging.INFO, "fastrl"):
        for _ in range(3):
            pick_made_up()
            pick_made_up(device_type="cuda", dtype=torch.float64)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "made_up_op on cpu float32: torch; triton refused: the tensors are on cpu"),
        ("WARNING",
         "made_up_op on cuda float64: torch; triton refused: float64 is not supported"),
    ]
    assert chosen_backends() == {"made_up_op cpu float32": "torch",
                                 "made_up_op cuda float64": "torch"}


def test_the_doctor_sees_every_op_with_every_backend() -> None:
    table = backend_table(ops, "cpu")
    names = {row.op for row in table}
    assert names == {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert len(table) == 3 * len(names) + 3  # and flash, which three ops have
    rows = {(row.op, row.backend): row for row in table}
    assert rows["compute_gae", "torch"].status == "chosen"
    assert rows["compute_gae", "torch"].reason == ""
    for backend in ("triton", "cuda"):
        assert rows["compute_gae", backend].status == "unavailable"
        assert rows["compute_gae", backend].reason != ""
        assert "no " + backend in rows["masked_sum", backend].reason
    assert rows["packed_attention", "flash"].status == "unavailable"
    assert "package flash_attn is not installed" in rows["packed_attention", "flash"].reason


def test_a_compiled_graph_holds_the_choice() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x if pick() == "torch" else x

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 2
