"""Streaming, stop strings and the pieces of text."""

import pytest
import torch

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.engine.text import TextPieces
from fastrl.models import DecoderConfig, new_decoder

MODEL = new_decoder(DecoderConfig(
    family="llama", vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=1,
    num_heads=2, num_kv_heads=2, head_dim=8, max_positions=64, rotary_dim=8,
    initializer_range=0.3), 0)
# Bytes of: a b c, space, and the two and three bytes of é and € in tokens of their own.
ALPHABET = [b"a", b"b", b"c", b" ", b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b"ab", b"c a",
            b"d"]


class ByteDecoder:
    """Token id -> bytes, as byte-level tokenizers do; id modulo 12 chooses the bytes."""

    def decode(self, ids: list[int]) -> str:
        return b"".join(ALPHABET[i % 12] for i in ids).decode("utf-8", errors="replace")


class JoiningDecoder:
    """Drops the space before the first word, as SentencePiece tokenizers do."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids).lstrip()


def test_pieces_are_complete_characters() -> None:
    pieces = TextPieces(ByteDecoder(), [0])
    assert [pieces.push(i) for i in (1, 4, 5, 6, 7, 8, 2)] == ["b", "", "é", "", "", "€", "c"]
    assert pieces.flush() == ""
    assert pieces.push(6) == "" and pieces.push(7) == ""
    assert pieces.flush() == "\ufffd"


def test_pieces_join_as_the_whole_text_does() -> None:
    for prompt in ([7], [1, 2, 3, 4, 5, 6, 7, 8]):
        pieces = TextPieces(JoiningDecoder(), prompt)
        assert [pieces.push(i) for i in (3, 4, 5)] == [" w3", " w4", " w5"]


@pytest.mark.parametrize(
    ("stop_strings", "ids", "stops_at"),
    [
        (("b",), [0, 0, 1, 0], 2),
        (("bca",), [1, 2, 0, 1], 2),  # over three tokens
        (("bc ",), [9, 10, 1], 1),  # in the middle of a token
        (("é",), [0, 4, 5], 2),
        (("xyz", "c"), [0, 1, 2], 2),
        (("ca",), [2, 3, 0, 1], None),
    ],
)
def test_stop_strings_are_found(
    stop_strings: tuple[str, ...], ids: list[int], stops_at: int | None
) -> None:
    pieces = TextPieces(ByteDecoder(), [0], stop_strings)
    stopped = []
    for token_id in ids:
        pieces.push(token_id)
        stopped.append(pieces.has_stopped)
    assert (stopped.index(True) if True in stopped else None) == stops_at


def test_the_prompt_is_not_searched() -> None:
    pieces = TextPieces(ByteDecoder(), [0, 1, 2], ("bc", "ca"))
    pieces.push(0)
    assert not pieces.has_stopped


SAMPLING = SamplingConfig(max_new_tokens=40, stop_token_ids=(45,))


@pytest.mark.parametrize("prompt", [[3], [5, 9, 11, 2, 3, 3]])
def test_stream_equals_generate(prompt: list[int]) -> None:
    engine = Engine(MODEL, EngineConfig(page_size=4), encoder=ByteDecoder())
    rollout = engine.generate([prompt], SAMPLING, seed=3, first_request_id=7)
    tokens = list(engine.stream(prompt, SAMPLING, seed=3, request_id=7))
    assert [token.token_id for token in tokens] == rollout.response(0)
    assert torch.equal(torch.tensor([token.logprob for token in tokens]),
                       rollout.rollout_logprobs[0])
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason == rollout.finish_reasons[0]
    text = ByteDecoder().decode(prompt + rollout.response(0))
    assert "".join(token.text for token in tokens) == text[len(ByteDecoder().decode(prompt)):]


def test_the_last_token_has_all_text_that_was_left() -> None:
    engine = Engine(MODEL, EngineConfig(page_size=4), encoder=ByteDecoder())
    left = 0
    for count in range(1, 12):  # some responses end inside a character
        tokens = list(engine.stream(
            [3], SamplingConfig(max_new_tokens=count, stop_token_ids=()), seed=3))
        text = ByteDecoder().decode([token.token_id for token in tokens])
        assert "".join(token.text for token in tokens) == text
        left += text.endswith("\ufffd")
    assert left > 0


def test_stream_without_encoder_has_no_text() -> None:
    tokens = list(Engine(MODEL).stream([3], SAMPLING))
    assert tokens and all(token.text == "" for token in tokens)


def test_generate_stops_at_strings() -> None:
    engine = Engine(MODEL, EngineConfig(page_size=4, max_batch_size=3, num_pages=14),
                    encoder=ByteDecoder())
    free = SamplingConfig(max_new_tokens=40, stop_token_ids=())
    sampling = SamplingConfig(max_new_tokens=40, stop_token_ids=(), stop_strings=("ba", "€", "d"))
    prompts = [[3], [5, 5], [9] * 7, [1, 2, 3, 4]]
    whole = engine.generate(prompts, free, num_samples_per_prompt=2)
    cut = engine.generate(prompts, sampling, num_samples_per_prompt=2)
    assert cut.finish_reasons.count("stop") >= 6
    for row in range(8):
        response = cut.response(row)
        assert response == whole.response(row)[: len(response)]
        text = ByteDecoder().decode(response)
        found = any(stop in text for stop in sampling.stop_strings)
        assert found == (cut.finish_reasons[row] == "stop")
        before = ByteDecoder().decode(response[:-1])
        assert not any(stop in before for stop in sampling.stop_strings)


def test_min_new_tokens_delays_stop_strings() -> None:
    engine = Engine(MODEL, encoder=ByteDecoder())
    sampling = SamplingConfig(max_new_tokens=40, stop_token_ids=(), stop_strings=("a", "b", "c"),
                              min_new_tokens=9)
    rollout = engine.generate([[3]] * 8, sampling)
    assert rollout.response_lens.min() == 9


def test_a_stream_that_is_left_gives_its_pages_back() -> None:
    engine = Engine(MODEL, EngineConfig(page_size=4))
    stream = engine.stream([3], SAMPLING)
    next(stream)
    assert len(engine._active) == 1
    stream.close()
    assert not engine._active and engine._idle_cache is not None
    assert engine._idle_cache.num_free == engine._idle_cache.num_pages
    engine.stream([3], SAMPLING)  # never started
    assert not engine._active


def test_two_streams_and_a_rollout_at_once() -> None:
    engine = Engine(MODEL, EngineConfig(page_size=4))
    alone = [[token.token_id for token in engine.stream(prompt, SAMPLING, seed=1)]
             for prompt in ([3], [4, 4])]
    a, b = engine.stream([3], SAMPLING, seed=1), engine.stream([4, 4], SAMPLING, seed=1)
    together: list[list[int]] = [[], []]
    for _ in range(3):
        together[0].append(next(a).token_id)
        together[1].append(next(b).token_id)
    engine.generate([[3]] * 4, SAMPLING)
    together[0].extend(token.token_id for token in a)
    together[1].extend(token.token_id for token in b)
    assert together == alone


def test_weights_changed_while_streaming() -> None:
    model = new_decoder(MODEL.backbone.config, 0)
    engine = Engine(model, EngineConfig(page_size=4))
    expected = [token.token_id for token in engine.stream([3, 5], SAMPLING)]
    stream = engine.stream([3, 5], SAMPLING)
    got = [next(stream).token_id for _ in range(6)]
    engine.weights_changed()
    got.extend(token.token_id for token in stream)
    assert got == expected


def test_cancel_while_streaming() -> None:
    engine = Engine(MODEL)
    tokens = []
    for token in engine.stream([3, 5], SAMPLING):
        tokens.append(token)
        if len(tokens) == 4:
            engine.cancel()
    assert len(tokens) == 4 and tokens[-1].finish_reason is None
    assert not engine._active


def test_rows_that_are_cancelled_are_of_the_rollout_and_of_no_stream() -> None:
    """A stream is row 0 of its own call; so is the first prompt of a rollout around another."""
    engine = Engine(MODEL)
    expected = [token.token_id for token in engine.stream([3, 5], SAMPLING)]
    stream = engine.stream([3, 5], SAMPLING)
    got = [next(stream).token_id for _ in range(2)]
    inner = []

    def cancel_inner(num_tokens: int, num_finished: int, total: int) -> None:
        engine.cancel([0])

    def cancel_outer(num_tokens: int, num_finished: int, total: int) -> None:
        if not inner:
            inner.append(engine.generate([[4], [6]], SAMPLING, on_progress=cancel_inner))
        elif num_tokens >= 8:
            engine.cancel([1])

    outer = engine.generate([[7], [8]], SAMPLING, on_progress=cancel_outer)
    assert [reason == "cancelled" for reason in inner[0].finish_reasons] == [True, False]
    assert [reason == "cancelled" for reason in outer.finish_reasons] == [False, True]
    engine.cancel([0])  # no rollout is under way
    got.extend(token.token_id for token in stream)
    assert got == expected


def test_modes_are_restored_between_tokens() -> None:
    model = new_decoder(MODEL.backbone.config, 0).train()
    stream = Engine(model).stream([3], SAMPLING)
    next(stream)
    assert model.training and torch.is_grad_enabled()
    stream.close()
