"""When the host reads what the device knows of each row."""

import pytest

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, generation
from fastrl.engine.flags import Flags
from fastrl.engine.step import DeviceStep
from fastrl.models import DecoderConfig, new_decoder

MODEL = new_decoder(DecoderConfig(
    family="llama", vocab_size=17, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=4, max_positions=64, rotary_dim=4), 0)


@pytest.mark.parametrize("behind", [0, 1])
def test_flags_are_read_once_the_next_round_is_queued(
    behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    waits: list[int] = []  # steps queued between a copy of flags and the look at it
    made: dict[int, int] = {}
    decode, begin, read = DeviceStep.decode, Flags.__init__, Flags.read

    def counted(*arguments: object, **settings: object) -> None:
        steps.append(1)
        decode(*arguments, **settings)  # type: ignore[arg-type]

    def begins(self: Flags, *arguments: object) -> None:
        begin(self, *arguments)  # type: ignore[arg-type]
        made[id(self)] = len(steps)

    def reads(self: Flags) -> object:
        waits.append(len(steps) - made[id(self)])
        return read(self)

    monkeypatch.setitem(generation.ROUNDS_BEHIND, "cpu", behind)
    monkeypatch.setattr(DeviceStep, "decode", counted)
    monkeypatch.setattr(Flags, "__init__", begins)
    monkeypatch.setattr(Flags, "read", reads)
    Engine(MODEL, EngineConfig(sync_every=4)).generate(
        [[1, 2], [3]], SamplingConfig(max_new_tokens=17, stop_token_ids=()))
    assert len(steps) == 16  # the first token comes with the prompt
    assert waits == ([4, 4, 4, 4, 0] if behind else [0] * 5)
