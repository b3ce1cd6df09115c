"""What a stranger's files can do: nothing but cause an error that says why."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fastrl
from fastrl.errors import ModelError
from fastrl.models.config import DecoderConfig
from fastrl.selftest.hostile import Outcome, try_all
from fastrl.selftest.hostile_cases import CASES

SOURCES = sorted(Path(fastrl.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in try_all(tmp_path_factory.mktemp("hostile"))}


def test_there_are_enough_and_every_one_was_tried(outcomes) -> None:
    assert list(outcomes) == [case.name for case in CASES] and len(CASES) >= 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_executes_and_the_error_says_what_to_do(outcomes, case) -> None:
    outcome = outcomes[case.name]
    assert outcome.events == (), outcome.message
    assert outcome.error in ("ModelError", "DataError", "ConfigError", "NotNativeError"), (
        outcome.message)
    places = (case.name, ".yaml", "in the model's config")
    assert any(place in outcome.message for place in places), outcome.message


PROBES = {
    "exec": "exec('1')", "compile": "compile('1', 'evil.py', 'eval')",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "system": "import os; os.system('true')", "socket": "import socket; socket.socket()",
    "pickle": "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
    "import": "import sys; sys.path.insert(0, 'OWN'); import evil",
}


@pytest.mark.parametrize("name", PROBES)
def test_the_watch_sees_what_it_must(tmp_path: Path, name: str) -> None:
    """The premise: what a case might do is found, by the hook that finds nothing in the cases."""
    (tmp_path / "evil.py").write_text("x = 1")
    code = PROBES[name].replace("OWN", str(tmp_path))
    script = tmp_path / "probe.py"
    script.write_text("import sys, pathlib, socket, subprocess, pickle, os\n"
                      "from fastrl.selftest.hostile import Watch\n"
                      "watch = Watch(pathlib.Path(sys.argv[1]))\n"
                      f"try:\n    {code}\nexcept BaseException: pass\n"
                      "print(len(watch.events))\n")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONPATH":
                                                      os.pathsep.join(sys.path)})
    assert int(done.stdout) > 0


def test_no_source_reads_pickles_or_trusts_remote_code() -> None:
    forbidden = re.compile(r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b|torch\.load\("
                           r"|allow_pickle|weights_only|trust_remote_code\s*=\s*True|yaml\.unsafe"
                           r"|yaml\.full|[^_.\w]eval\(", re.MULTILINE)
    found = {str(path): forbidden.findall(path.read_text(encoding="utf-8")) for path in SOURCES
             if forbidden.search(path.read_text("utf-8"))}
    assert found == {} and len(SOURCES) > 100


def test_no_option_trusts_remote_code() -> None:
    from fastrl.options import options
    from fastrl.runs import RUN_TYPES

    names = [option.name for cls in RUN_TYPES.values() for option in options(cls)]
    assert names and not [name for name in names if "trust" in name or "remote" in name]


def test_a_local_model_is_read_without_a_socket(tmp_path: Path, monkeypatch) -> None:
    from fastrl.selftest.hostile_cases import good_model, good_tokenizer

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    good_model(tmp_path / "model")
    good_tokenizer(tmp_path / "tokenizer")


def test_sizes_that_no_model_has_are_refused_before_memory_is_taken() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_layers": 1,
             "num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "max_positions": 8}
    DecoderConfig(family="llama", **sizes)
    for name in sizes:
        for value in (0, 2**31 + 1):
            with pytest.raises(ModelError, match=f"{name}: expected a whole number from 1 to"):
                DecoderConfig(family="llama", **{**sizes, name: value})
