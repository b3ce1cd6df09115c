"""`fastrl chat`: talk to a model in the terminal.

`ChatSession` is the conversation: history, context limit, answers token by token. The rest reads
lines and prints. A model whose tokenizer has no chat template continues the text as it stands.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fastrl.config import SamplingConfig, check
from fastrl.errors import ConfigError, DataError, FastRLError
from fastrl.generate import sampling_for
from fastrl.yaml_file import nearest, parse_yaml

if TYPE_CHECKING:
    from fastrl.console import Console
    from fastrl.data import TextEncoder
    from fastrl.engine import Engine

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/undo": "take back the last question and its answer",
    "/temperature": "show or set the temperature, as in /temperature 0.7",
    "/quit": "leave (also Ctrl-D)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRun(SamplingConfig):
    """The settings of `fastrl chat`."""

    model_name_or_path: str = field(metadata={"aliases": ("model",)})
    """Folder of the model."""
    system: str | None = None
    """System message at the beginning of the conversation; not with prompt_format text."""
    prompt_format: Literal["auto", "text", "chat"] = "auto"
    """chat: turns are messages; text: the model continues the text as it stands; auto: chat where
    the tokenizer has a chat template."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    seed: int = 0
    """The same seed and questions give the same answers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        check(self.seed >= 0, "seed", "a whole number of at least 0", self.seed)


class ChatSession:
    """A conversation with a model.

    Args:
        engine: Generates; its model's `max_positions` is the context limit.
        encoder: Tokenizer, chat template and prompt format of the model.
        sampling: How tokens are drawn.
        system: System message of a conversation in messages.
        seed: Seeds the answers; each turn draws other random numbers.
    """

    def __init__(self, engine: "Engine", encoder: "TextEncoder", sampling: SamplingConfig, *,
                 system: str | None = None, seed: int = 0) -> None:
        self.engine, self.encoder = engine, encoder
        self.sampling, self.system, self.seed = sampling, system, seed
        self.is_chat = encoder.prompt_format == "chat" or (
            encoder.prompt_format == "auto" and encoder.has_chat_template)
        """True when turns are messages, False when the model continues text."""
        check(system is None or self.is_chat, "system",
              "no system message where the model continues text (see prompt_format)", system)
        self.turns: list[tuple[str, str]] = []
        """Questions and answers that the model still sees."""
        self.num_dropped = 0
        """Oldest turns that the last reply left out for lack of room."""
        self._num_replies = 0

    def reply(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; history holds what was yielded when this is closed.

        Raises:
            DataError: when the question alone does not fit into the context; history is unchanged.
        """
        ids = self._prompt(question)
        room = self.engine.model.spec.max_positions - len(ids)
        sampling = dataclasses.replace(
            self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room),
            min_new_tokens=min(self.sampling.min_new_tokens, room))
        self._num_replies += 1
        pieces: list[str] = []
        try:
            for token in self.engine.stream(ids, sampling, seed=self.seed + self._num_replies):
                pieces.append(token.text)
                yield token.text
        finally:
            self.turns.append((question, "".join(pieces)))

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def undo(self) -> bool:
        """Take back the last turn; False when there is none."""
        return bool(self.turns) and bool(self.turns.pop())

    def _prompt(self, question: str) -> list[int]:
        """Tokens of the conversation, without the oldest turns where they leave no room."""
        limit = self.engine.model.spec.max_positions
        for num_dropped in range(len(self.turns) + 1):
            kept = self.turns[num_dropped:]
            ids = self._encode(kept, question)
            # Earlier turns go before the answer gets shorter; a question alone may shorten it.
            if len(ids) + (self.sampling.max_new_tokens if kept else 1) <= limit:
                self.turns, self.num_dropped = kept, num_dropped
                return ids
        raise DataError(f"chat: expected a question of fewer than {limit} tokens, the model's "
                        f"context, got {len(ids)}; shorten it")

    def _encode(self, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
        if not self.is_chat:
            earlier = "".join(asked + answer + "\n" for asked, answer in turns)
            return self.encoder.encode_prompt(earlier + question)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answer in turns:
            messages += [{"role": "user", "content": asked},
                         {"role": "assistant", "content": answer}]
        return self.encoder.encode_prompt([*messages, {"role": "user", "content": question}])


def run_command(session: ChatSession, line: str) -> str | None:
    """Carry out a line that begins with a slash; return what to show, None to leave.

    Raises:
        ConfigError: when a value cannot be used.
    """
    command, _, value = line.partition(" ")
    if command == "/quit":
        return None
    if command == "/help":
        return "\n".join(f"{name:<14}{meaning}" for name, meaning in COMMANDS.items())
    if command == "/reset":
        session.reset()
        return "the conversation begins anew"
    if command == "/undo":
        return "the last turn is taken back" if session.undo() else "there is no turn to take back"
    if command == "/temperature":
        return _temperature(session, value.strip())
    meant = nearest(command, COMMANDS)
    return f"unknown command {command}; " + (f"did you mean {meant}?" if meant else "try /help")


def _temperature(session: ChatSession, value: str) -> str:
    if value:
        number = parse_yaml(value, "/temperature")
        check(isinstance(number, int | float) and not isinstance(number, bool), "/temperature",
              "a number above 0", value)
        session.sampling = dataclasses.replace(session.sampling, temperature=float(number))
    return f"temperature {session.sampling.temperature:g}"


def chat(config: ChatRun, console: "Console") -> None:
    """Read questions and print answers until the person leaves.

    Raises:
        ConfigError: a system message for a model that continues text.
        ModelError: the model cannot be loaded.
    """
    from fastrl.data import load_encoder
    from fastrl.engine import Engine
    from fastrl.stages.inputs import load_policy

    encoder = load_encoder(config.model_name_or_path, prompt_format=config.prompt_format)
    model = load_policy(config.model_name_or_path, config, encoder)
    session = ChatSession(Engine(model, encoder=encoder), encoder,
                          sampling_for(config, model, encoder), system=config.system,
                          seed=config.seed)
    console.print(f"{config.model_name_or_path}; /help lists the commands, Ctrl-C stops an answer")
    if not session.is_chat:
        console.print("the model continues your text as it stands (--prompt_format chat: messages)")
    _loop(session, console)


def _loop(session: ChatSession, console: "Console") -> None:
    """Lines in, answers out."""
    if sys.stdin is None:  # closed by the caller
        raise ConfigError("chat: expected questions on standard input, got a closed one")
    try:
        import readline  # noqa: F401  line editing and history for input(); absent on Windows
    except ModuleNotFoundError:
        pass
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/quit leaves")
            continue
        if not line:
            continue
        try:
            if not line.startswith("/"):
                _answer(session, line, console)
            elif (shown := run_command(session, line)) is not None:
                console.print(shown)
            else:
                return
        except FastRLError as error:
            console.warning(str(error))


def _answer(session: ChatSession, question: str, console: "Console") -> None:
    """Print one answer as it is made; Ctrl-C stops it and keeps what is there."""
    pieces = session.reply(question)
    try:
        for piece in pieces:
            console.piece(piece)
    except KeyboardInterrupt:
        console.piece(" [stopped]")
    console.piece("\n")
    if session.num_dropped:
        console.print(f"({session.num_dropped} oldest turns no longer fit and were dropped)")
