"""Rules of the house that a machine can check."""

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from fastrl import config, runs

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "fastrl").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def test_import_is_light() -> None:
    code = ("import sys, fastrl; print([m for m in ('torch', 'triton', 'transformers', 'numpy') "
            "if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["fastrl.trainers.ppo", "fastrl.engine", "fastrl.data",
                                    "fastrl.models", "fastrl.pipeline"])
def test_transformers_is_imported_lazily(module: str) -> None:
    code = f"import sys, {module}; print('transformers' in sys.modules, 'triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[0] == "False", f"{module} imports transformers when imported"


def _dataclass_nodes(module: object) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


SETTINGS = ["config.sampling", "config.train", "config.supervised", "config.ppo", "presets",
            "reward_settings", "runs.between", "runs.ppo", "runs.training"]


def test_every_class_of_settings_is_looked_at() -> None:
    classes = {name for place in SETTINGS
               for name in _dataclass_nodes(import_module(f"fastrl.{place}"))}
    assert {cls.__name__ for cls in runs.RUN_TYPES.values()} <= classes
    assert {name for name in config.__all__ if name.endswith("Config")} <= classes


@pytest.mark.parametrize("place", SETTINGS)
def test_every_config_field_has_a_sentence(place: str) -> None:
    module = import_module(f"fastrl.{place}")
    missing = []
    for name, node in _dataclass_nodes(module).items():
        if not dataclasses.is_dataclass(getattr(module, name)):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign):
                continue
            documented = (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                          and isinstance(after.value.value, str)
                          and after.value.value.rstrip().endswith("."))
            if not documented:
                missing.append(f"{name}.{ast.unparse(field.target)}")
    assert missing == []


def test_every_op_has_a_test_a_benchmark_and_a_preference() -> None:
    files = [p for p in (ROOT / "fastrl/ops").glob("*.py") if p.stem != "__init__"]
    assert len(files) >= 12
    for path in files:
        source = path.read_text()
        assert re.search(r"^PREFERENCE\b", source, re.M), f"{path.name} has no PREFERENCE"
        assert re.search(r"^def \w+_reference\(", source, re.M), f"{path.name} has no reference"
        assert (ROOT / "tests/ops" / f"test_{path.name}").exists(), f"no test for {path.name}"
        assert (ROOT / "benchmarks" / f"bench_{path.name}").exists(), f"no bench for {path.name}"


# Each banned word is the wrong spelling of a name in use; word boundaries on both sides.
FORBIDDEN_NAMES = ("padding_mask", "action_mask", "completion_mask", "vpreds", "logps", "log_probs",
                   "kl_div", "pi_old", "logp")


def test_names_have_one_spelling() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Name):
                names = [node.id]
            elif isinstance(node, ast.arg):
                names = [node.arg]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            found += [f"{path.name}: {n}" for n in names if n in FORBIDDEN_NAMES]
    assert found == []


def test_nothing_unpickles_or_swallows_errors() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                hands_on = node.name is not None and any(
                    isinstance(inner, ast.Name) and inner.id == node.name
                    for statement in node.body for inner in ast.walk(statement))
                assert raises or hands_on or caught not in ("", "Exception", "BaseException"), (
                    f"{path}:{node.lineno} swallows every error")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert "pickle" not in modules, f"{path}:{node.lineno} imports pickle"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "eval", "exec"), f"{path}:{node.lineno}"


def test_prints_belong_to_the_console() -> None:
    allowed = {"cli.py", "console.py", "doctor.py", "chat.py", "generate.py"}
    for path in SOURCES:
        if path.name in allowed:
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
                 and isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert calls == [], f"{path}:{calls[0].lineno} prints"


RANK = {"errors": 0, "environment": 0, "types": 0, "packing": 0, "config": 0, "backends": 1,
        "checks": 1, "dense_attention": 1, "out_of_memory": 1, "ops": 2, "models": 3, "memory": 3,
        "advantages": 3, "losses": 3, "kl_control": 3, "engine": 4, "rewards": 4, "watch": 4,
        "trainers": 5,
        "evaluation": 6, "stages": 7, "pipeline": 8, "planning": 8, "demo": 9, "cli": 10}


def test_imports_only_go_downwards() -> None:
    for path in (ROOT / "fastrl").rglob("*.py"):
        own = path.relative_to(ROOT / "fastrl").parts[0].removesuffix(".py")
        if own not in RANK:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastrl."):
                other = (node.module or "").split(".")[1]
                assert RANK.get(other, 0) <= RANK[own], f"{path}: imports fastrl.{other}"


def test_kernels_is_a_source_root() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "import fastrl\n" not in path.read_text()
        assert "from fastrl " not in path.read_text() and "from fastrl." not in path.read_text()


def test_every_kernel_is_in_the_table_and_explained() -> None:
    table = (ROOT / "kernels/README.md").read_text()
    folder = ROOT / "kernels/fastrl_kernels/triton"
    sources = [f"triton/{p.name}" for p in folder.glob("*.py") if "def aot_cases" in p.read_text()]
    for source in sources + [f"csrc/{p.name}" for p in (ROOT / "csrc").glob("*.cu")]:
        assert f"`{source}`" in table, f"kernels/README.md has no row for {source}"
    sections = (ROOT / "docs/kernels.md").read_text().split("\n## ")[1:]
    titles = " ".join(section.partition("\n")[0] for section in sections)
    for column in re.findall(r"^\| (`.+?) \|", table, re.M):
        for op in re.findall(r"`([a-z_]+)`", column):
            assert re.search(rf"\b{op}\b", titles), f"docs/kernels.md does not explain {op}"
    for section in sections:
        words = ["measured"] + ["Parallelisation.", "Bytes.", "Numerics.", "What was tried."] * (
            "(Triton" in section.partition("\n")[0])
        assert all(word in section for word in words), f"docs/kernels.md: {section[:40]!r}"


@pytest.mark.slow
def test_the_wheel_is_pure_python_and_holds_two_packages(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation",
         "-q", "-w", str(tmp_path)], check=True, capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"fastrl", "fastrl_kernels"}
    assert "fastrl/demo/recipe.yaml" in names and "fastrl/py.typed" in names


def test_a_cuda_build_that_cannot_work_says_why() -> None:
    for value, expected in (("2", "expected 0 or 1"), ("1", "nvcc was not found")):
        out = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT,
                             env={"FASTRL_BUILD_CUDA": value, "PATH": ""}, capture_output=True,
                             text=True)
        assert out.returncode != 0 and expected in out.stderr


def _commands_of_make(*arguments: str) -> str:
    """What make would run in a clean clone, without running it."""
    return subprocess.run(["make", "--dry-run", *arguments, "VENV=not-there"], cwd=ROOT,
                          capture_output=True, text=True, check=True,
                          env={"PATH": os.environ["PATH"]}).stdout


def test_make_installs_one_torch_version_that_a_user_can_override() -> None:
    lines = [line for line in _commands_of_make("demo").splitlines() if "torch==" in line]
    assert len(lines) == 1 and '"torch==2.13.0"' in lines[0]
    changed = _commands_of_make("demo", "TORCH=torch==2.11.0")
    assert '"torch==2.11.0"' in changed and "2.13.0" not in changed


def test_make_demo_and_make_test_do_everything_from_a_clean_clone() -> None:
    demo, test = _commands_of_make("demo"), _commands_of_make("test")
    for expected in ("-m venv not-there", "pip install", " -e .\n"):
        assert expected in demo and expected in test
    assert demo.rstrip().endswith("not-there/bin/fastrl demo")
    for expected in ("ruff check .", "not-there/bin/mypy\n", '-e ".[test]"', "-m pytest", "tests"):
        assert expected in test
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_make_pins_what_the_interpreter_needs_and_compiles_everything_on_request() -> None:
    test, aot = _commands_of_make("test"), _commands_of_make("aot")
    assert '"triton==3.6.0"' in test and "-c constraints.txt" in test
    assert "numpy<2.4" in (ROOT / "constraints.txt").read_text().splitlines()
    assert "FASTRL_AOT=every" in aot and aot.rstrip().endswith("tests/kernels/test_aot.py")


def test_requirements_are_the_documented_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11" and project["name"] == "fastrl-engine"
    for requirement in ("torch>=2.11", "triton>=3.6; platform_system == 'Linux'",
                        "transformers>=5.17"):
        assert requirement in project["dependencies"]
