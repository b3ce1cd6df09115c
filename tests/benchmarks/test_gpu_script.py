"""benchmarks/gpu.sh on a machine without a GPU: the same flow at small sizes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import load

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with this Python and no GPU."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables})


@pytest.mark.slow
def test_the_kernels_part_without_a_gpu(tmp_path: Path) -> None:
    done = script("kernels", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no GPU, torch ") and "missing: " in done.stdout.splitlines()[0]
    for step in ("build", "tests", "memcheck"):
        assert f"{step:<11}    -    skipped: no GPU" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("passed")
    (path,) = tmp_path.glob("kernels_cpu_*.json")
    document, rows = load(path)
    assert "--small" in document["command"]
    assert {row.status for row in rows if row.provider == "torch"} == {"ok"}


@pytest.mark.slow
def test_the_engine_part_without_a_gpu(tmp_path: Path) -> None:
    done = script("engine", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests          -    skipped: no GPU" in done.stdout
    (path,) = tmp_path.glob("engine_cpu_*.json")
    document, rows = load(path)
    assert "--small" in document["command"]
    by_provider = {row.provider: row for row in rows}
    assert all(by_provider[name].status == "ok" for name in ("fastrl", "fastrl_eager"))
    assert by_provider["fastrl"].extra["no_graphs"] == "the model is on cpu"
    assert by_provider["transformers_batch"].reason == "its cache takes most of a CPU's memory"


@pytest.mark.slow
def test_the_exact_part_without_a_gpu(tmp_path: Path) -> None:
    done = script("exact", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests          -    skipped: no GPU" in done.stdout
    (path,) = tmp_path.glob("exact_cpu_*.json")
    document, rows = load(path)
    assert "--small" in document["command"]
    assert {row.workload for row in rows} == {
        "sweep", "generate", "update", "arena", "update beside the cache", "parking"}


@pytest.mark.slow
def test_the_big_part_without_a_gpu(tmp_path: Path) -> None:
    done = script("big", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build          -    skipped: no GPU" in done.stdout
    (path,) = tmp_path.glob("big_cpu_*.json")
    document, rows = load(path)
    assert "--small" in document["command"]
    assert [row.status for row in rows] == ["ok"] * 5


@pytest.mark.slow
def test_the_ppo_part_without_a_gpu(tmp_path: Path) -> None:
    done = script("ppo", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build          -    skipped: no GPU" in done.stdout
    (path,) = tmp_path.glob("ppo_cpu_*.json")
    document, rows = load(path)
    assert "ppo_tiny" in document["command"] and document["ceilings"]["measured"] is not None
    assert [row.provider for row in rows] == ["fastrl", "trl"]
    assert rows[0].status == "ok" and rows[1].status in ("ok", "unavailable")


def test_an_unknown_part_is_an_error_that_names_the_known(tmp_path: Path) -> None:
    done = script("nothing", OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and "unknown part 'nothing'; known: " in done.stderr
    assert "kernels" in done.stderr and not (tmp_path / "out").exists()


def test_a_failing_step_fails_the_script_and_is_in_its_summary(tmp_path: Path) -> None:
    """A Python that can describe the machine and nothing else."""
    python = tmp_path / "python"
    python.write_text(f"""#!/usr/bin/env bash
[ "$2" = benchmarks.machine ] && exec {sys.executable} "$@"
exit 3
""")
    python.chmod(0o755)
    done = script("kernels", OUT=str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("FAILED with 3")


def test_the_steps_on_a_gpu(tmp_path: Path) -> None:
    """Every program is replaced by one that notes its command; the machine claims a GPU."""
    log = tmp_path / "commands"
    for name in ("python", "compute-sanitizer", "nvcc"):
        (tmp_path / name).write_text(f"""#!/usr/bin/env bash
[ "$2" = benchmarks.machine ] && printf 'A GPU\\ncuda 9.0a\\n' && exit
[ "$1" = -c ] || echo "$TORCH_CUDA_ARCH_LIST {name} $*" >> {log}
""")
        (tmp_path / name).chmod(0o755)
    done = script("kernels", OUT=str(tmp_path / "out"), PYTHON=str(tmp_path / "python"),
                  PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0 and done.stdout.startswith("A GPU\n"), done.stdout + done.stderr
    assert "skipped" not in done.stdout and done.stdout.count("passed") == 4
    build, tests, memcheck, benchmarks = log.read_text().splitlines()
    assert build.startswith("9.0a python setup.py -q build_ext --build-lib build/gpu/lib")
    assert "-m pytest -m gpu -q -n 8" in tests and tests.endswith("tests/kernels tests/ops")
    assert " compute-sanitizer --tool memcheck" in memcheck and "--check_only" in memcheck
    assert "--ops norm adamw gae grad_norm kl kv_cache logprob " in memcheck
    assert "kernels --device cuda --budget 110 --out" in benchmarks and "small" not in benchmarks
    log.unlink()
    done = script("big", OUT=str(tmp_path / "out"), PYTHON=str(tmp_path / "python"),
                  PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0 and done.stdout.count("passed") == 2
    assert log.read_text().splitlines()[1].startswith(
        " python -m benchmarks big --device cuda --out")
    log.unlink()
    done = script("ppo", OUT=str(tmp_path / "out"), PYTHON=str(tmp_path / "python"),
                  PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0 and done.stdout.count("passed") == 2
    measured = log.read_text().splitlines()[1]
    assert " -m benchmarks.bench_ppo --device cuda --budget 255 --out" in measured


def test_the_tests_that_need_a_gpu_run_without_the_plugins(tmp_path: Path) -> None:
    """A bare machine has pytest and none of the plugins that pyproject.toml's settings know."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only",
         "-p", "no:cacheprovider", "tests/kernels", "tests/ops"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_on_a_gpu" in done.stdout
