"""fastrl chat: turns, context limit, commands and streaming, on a tiny random model."""

import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastrl.chat as chat_module
from fastrl import cli
from fastrl.chat import ChatSession, run_command
from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import TextEncoder, train_bpe_tokenizer, word_tokenizer
from fastrl.engine import Engine
from fastrl.errors import ConfigError, DataError
from fastrl.models import CausalLM, DecoderConfig, new_decoder
from fastrl.models.weights import save_causal_lm

WORDS = [f"w{i}" for i in range(37)]
SAMPLING = SamplingConfig(max_new_tokens=8)


def tiny_model(encoder: TextEncoder, max_positions: int = 64) -> CausalLM:
    config = DecoderConfig(family="llama", vocab_size=encoder.max_token_id + 1, hidden_size=16,
                           intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1,
                           head_dim=8, rotary_dim=8, max_positions=max_positions)
    return new_decoder(config, seed=0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """An encoder without a chat template."""
    return word_tokenizer(WORDS, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """An encoder with one."""
    texts = ["hello there, how are you?", "what does the fox eat? berries."] * 20
    encoder = train_bpe_tokenizer(texts, 300, tmp_path_factory.mktemp("bpe"))
    assert encoder.has_chat_template
    return encoder


def session(encoder: TextEncoder, max_positions: int = 64, sampling: SamplingConfig = SAMPLING,
            system: str | None = None) -> ChatSession:
    engine = Engine(tiny_model(encoder, max_positions), encoder=encoder)
    return ChatSession(engine, encoder, sampling, system=system)


def prompts_seen(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Prompts that the engine gets from now on."""
    seen: list[list[int]] = []
    stream = session.engine.stream

    def record(ids: list[int], *args: object, **kwargs: object) -> Iterator[object]:
        seen.append(list(ids))
        return stream(ids, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(session.engine, "stream", record)
    return seen


def test_text_models_continue_the_whole_conversation(plain: TextEncoder,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session(plain)
    seen = prompts_seen(talk, monkeypatch)
    first = "".join(talk.reply("w1 w2"))
    second = "".join(talk.reply("w3"))
    assert talk.turns == [("w1 w2", first), ("w3", second)]
    assert seen[0] == plain.encode_prompt("w1 w2")
    assert seen[1] == plain.encode_prompt("w1 w2" + first + "\nw3")


def test_answers_are_what_the_engine_generates(plain: TextEncoder) -> None:
    talk = session(plain)
    answer = "".join(talk.reply("w5 w6"))
    rollout = talk.engine.generate([plain.encode_prompt("w5 w6")], SAMPLING, seed=1)
    whole = plain.decode([*plain.encode_prompt("w5 w6"), *rollout.response(0)])
    assert whole == "w5 w6" + answer


def test_chat_models_see_messages(chatty: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session(chatty, max_positions=256, system="be kind")
    seen = prompts_seen(talk, monkeypatch)
    first = "".join(talk.reply("hello"))
    "".join(talk.reply("how are you?"))
    system = {"role": "system", "content": "be kind"}
    asked = {"role": "user", "content": "hello"}
    assert seen[0] == chatty.encode_prompt([system, asked])
    assert seen[1] == chatty.encode_prompt(
        [system, asked, {"role": "assistant", "content": first},
         {"role": "user", "content": "how are you?"}])


def test_system_message_needs_messages(plain: TextEncoder) -> None:
    with pytest.raises(ConfigError, match="system: expected no system message"):
        session(plain, system="be kind")


def test_oldest_turns_are_dropped_when_there_is_no_room(plain: TextEncoder,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session(plain, max_positions=40)
    seen = prompts_seen(talk, monkeypatch)
    dropped = []
    for number in range(6):
        "".join(talk.reply(f"w{number} w1 w1 w1"))
        dropped.append(talk.num_dropped)
    assert dropped[0] == 0 and sum(dropped) > 0
    assert all(len(ids) + SAMPLING.max_new_tokens <= 40 for ids in seen)
    assert len(talk.turns) == 6 - sum(dropped)
    assert talk.turns[-1][0] == "w5 w1 w1 w1"


def test_a_long_question_shortens_the_answer(plain: TextEncoder,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session(plain, max_positions=20)
    seen = prompts_seen(talk, monkeypatch)
    "".join(talk.reply(" ".join(["w1"] * 17)))
    assert len(seen[0]) == 17
    ids = plain.encode_text(talk.turns[0][1])
    assert len(ids) <= 3


def test_a_question_beyond_the_context_is_refused(plain: TextEncoder) -> None:
    talk = session(plain, max_positions=20)
    "".join(talk.reply("w1"))
    before = list(talk.turns)
    with pytest.raises(DataError, match="fewer than 20 tokens, the model's context, got 20"):
        list(talk.reply(" ".join(["w1"] * 20)))
    assert talk.turns == before


def test_a_stopped_answer_is_kept_as_far_as_it_came(plain: TextEncoder) -> None:
    talk = session(plain)
    pieces = talk.reply("w1")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.turns == [("w1", first)]
    "".join(talk.reply("w2"))
    assert len(talk.turns) == 2


def test_same_seed_same_conversation(plain: TextEncoder) -> None:
    answers = []
    for _ in range(2):
        talk = session(plain)
        answers.append(["".join(talk.reply("w1")), "".join(talk.reply("w1"))])
    assert answers[0] == answers[1]


def test_commands(plain: TextEncoder) -> None:
    talk = session(plain)
    assert run_command(talk, "/undo") == "there is no turn to take back"
    "".join(talk.reply("w1"))
    "".join(talk.reply("w2"))
    assert run_command(talk, "/undo") == "the last turn is taken back"
    assert [asked for asked, _ in talk.turns] == ["w1"]
    assert run_command(talk, "/reset") == "the conversation begins anew" and talk.turns == []
    assert run_command(talk, "/temperature") == "temperature 1"
    assert run_command(talk, "/temperature 0.25") == "temperature 0.25"
    assert talk.sampling == dataclasses.replace(SAMPLING, temperature=0.25)
    for value in ("0", "-1", "hot", "true"):
        with pytest.raises(ConfigError, match="temperature: expected a number above 0"):
            run_command(talk, f"/temperature {value}")
    assert "/temperature" in str(run_command(talk, "/help"))
    assert run_command(talk, "/rest") == "unknown command /rest; did you mean /reset?"
    assert run_command(talk, "/quit") is None


def test_loop_reads_lines_and_survives_mistakes(plain: TextEncoder,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[object] = ["w1", "", "/temperature hot", " ".join(["w1"] * 70),
                           KeyboardInterrupt(), "/help", "/quit", "w2"]

    def answer(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", answer)
    out = io.StringIO()
    talk = session(plain)
    chat_module._loop(talk, Console(file=out, live=False, width=200))
    assert [asked for asked, _ in talk.turns] == ["w1"]
    text = out.getvalue()
    assert talk.turns[0][1] in text
    for expected in ("warning: /temperature: expected a number", "warning: chat: expected",
                     "/quit leaves", "forget the conversation"):
        assert expected in text
    assert lines == ["w2"]


def test_closed_standard_input_is_a_message(plain: TextEncoder,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="questions on standard input, got a closed one"):
        chat_module._loop(session(plain), Console(file=io.StringIO(), live=False))


def test_ctrl_c_stops_the_answer_only(plain: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session(plain)
    console = Console(file=io.StringIO(), live=False)
    pieces: list[str] = []

    def piece(text: str) -> None:
        if len(pieces) == 2:
            pieces.append("interrupt")
            raise KeyboardInterrupt
        pieces.append(text)

    monkeypatch.setattr(console, "piece", piece)
    chat_module._answer(talk, "w1", console)
    assert pieces[2:] == ["interrupt", " [stopped]", "\n"]
    assert talk.turns[0][0] == "w1" and talk.turns[0][1].startswith("".join(pieces[:2]))


def test_command_line(plain: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                      capsys: pytest.CaptureFixture[str]) -> None:
    save_causal_lm(tiny_model(plain), tmp_path / "m", tokenizer_from=plain.path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n/undo\n"))
    code = cli.main(["chat", "--model_name_or_path", str(tmp_path / "m"), "--max_new_tokens", "4"])
    out = capsys.readouterr().out
    assert code == 0
    assert "the model continues your text as it stands" in out
    assert "the last turn is taken back" in out


def test_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--model", str(tmp_path / "absent")]) == 2
    assert "absent: expected a model folder" in capsys.readouterr().err
