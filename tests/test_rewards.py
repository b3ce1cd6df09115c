"""Scorers and what PPO does to a score before it becomes a reward."""

import sys
from collections.abc import Sequence
from threading import Event
from time import monotonic

import pytest
import torch

from fastrl.errors import ConfigError, DataError, RewardError, ShapeError
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.models.decoder import DecoderConfig, new_decoder
from fastrl.models.scoring import response_scores
from fastrl.rewards import FunctionScorer, RewardModelScorer, adjust_scores, decode_response
from fastrl.types import Prompt, Rollout

EOS = 1


class LetterCodec:
    """Token 1 ends a text, token 2 is 'a', token 3 is 'b' and so on."""

    eos_token_ids = (EOS,)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("!" if t == EOS else chr(ord("a") + t - 2) for t in ids)


def make_rollout(prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
    sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, responses))
    mask = torch.tensor([[t < len(r) for t in range(width)] for r in responses])
    return Rollout(
        token_ids=torch.tensor([t for s in sequences for t in s]),
        cu_seqlens=torch.tensor([0, *map(len, sequences)]).cumsum(0),
        prompt_lens=torch.tensor([len(p) for p in prompts]),
        response_ids=torch.tensor([r + [0] * (width - len(r)) for r in responses]),
        response_mask=mask,
        rollout_logprobs=torch.zeros(mask.shape),
        entropy=torch.zeros(mask.shape),
        finish_reasons=tuple("stop" if r[-1] == EOS else "length" for r in responses),
    )


ROLLOUT = make_rollout([[2, 3], [4]], [[2, 2, EOS], [3, 4]])


def test_function_sees_prompt_text_and_completions_without_the_end_token() -> None:
    seen = []

    def count_a(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [text.count("a") for text in completions]

    scores = FunctionScorer(count_a, LetterCodec(), [Prompt((2, 3), "a question")])(ROLLOUT)
    assert seen == [("a question", "aa"), ("c", "bc")]  # the second prompt is not known: decoded
    assert scores.tolist() == [2.0, 0.0] and scores.dtype == torch.float32
    assert decode_response(ROLLOUT, 0, LetterCodec()) == "aa"


ROWS = [Prompt((2, 3), "a question", row={"answer": 7, "level": "easy"}),
        Prompt((4,), "another", row={"answer": 8})]


def test_a_function_gets_the_fields_that_it_names() -> None:
    seen: dict[str, object] = {}

    def named(prompts: list[str], completions: list[str], answer: list[int],
              absent: str = "default") -> list[float]:
        seen.update(answer=answer, absent=absent)
        return [1.0, 2.0]

    def everything(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        seen.update(columns=columns)
        return [1.0, 2.0]

    assert FunctionScorer(named, LetterCodec(), ROWS)(ROLLOUT).tolist() == [1.0, 2.0]
    FunctionScorer(everything, LetterCodec(), ROWS)(ROLLOUT)
    assert seen == {"answer": [7, 8], "absent": "default",
                    "columns": {"answer": [7, 8], "level": ["easy", None]}}


def test_a_column_that_no_row_has_is_an_error_that_names_function_and_column() -> None:
    def named(prompts: list[str], completions: list[str], answer: list[int],
              level: object = None) -> list[float]:
        return [1.0, 2.0]

    message = "function named: expected a column 'answer' .*got rows with 'level'; add it"
    with pytest.raises(RewardError, match=message):  # before anything is generated
        FunctionScorer(named, LetterCodec(), [Prompt((2, 3), "q", row={"level": "easy"})])
    with pytest.raises(RewardError, match="column 'answer' .*got rows with no columns"):
        FunctionScorer(named, LetterCodec())(ROLLOUT)
    # A row alone may lack it.
    some = [ROWS[0], Prompt((4,), "another", row={"level": "hard"})]
    assert FunctionScorer(named, LetterCodec(), some)(ROLLOUT).tolist() == [1.0, 2.0]


def test_equal_prompts_must_agree_on_the_columns_that_a_function_names() -> None:
    def named(prompts: list[str], completions: list[str], answer: list[int]) -> list[float]:
        return [float(a) for a in answer]

    twice = [*ROWS, Prompt((4,), "another", row={"answer": 9})]
    with pytest.raises(DataError, match="equal values of 'answer', got 8 and 9 for 'another'"):
        FunctionScorer(named, LetterCodec(), twice)
    other = [*ROWS, Prompt((4,), "another", row={"answer": 8, "level": "hard"})]
    assert FunctionScorer(named, LetterCodec(), other)(ROLLOUT).tolist() == [7.0, 8.0]


def test_functions_as_trl_has_them_get_their_arguments_by_name() -> None:
    seen: dict[str, object] = {}

    def short(completions: list[str], **kwargs: object) -> list[float]:
        seen.update(completions=completions, kwargs=kwargs)
        return [-float(len(text)) for text in completions]

    def swapped(completions: list[str], prompts: list[str], *, answer: list[int]) -> list[float]:
        seen.update(swapped=(prompts, completions, answer))
        return [0.0, 0.0]

    rows = [Prompt((2, 3), "q", row={"answer": 7, "completions": "hides nothing"}),
            Prompt((4,), "r", row={"answer": 8})]
    assert FunctionScorer(short, LetterCodec(), rows)(ROLLOUT).tolist() == [-2.0, -2.0]
    FunctionScorer(swapped, LetterCodec(), rows)(ROLLOUT)
    assert seen == {"completions": ["aa", "bc"],
                    "kwargs": {"prompts": ["q", "r"], "answer": [7, 8]},
                    "swapped": (["q", "r"], ["aa", "bc"], [7, 8])}


@pytest.mark.parametrize("fn", [lambda: [], lambda text: [0.0], lambda p, *, c: [0.0]])
def test_a_function_without_room_for_prompts_and_completions_is_refused(fn: object) -> None:
    with pytest.raises(ConfigError, match=r"expected parameters \(prompts, completions, "):
        FunctionScorer(fn, LetterCodec())  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout_s", [None, 30])
def test_a_function_that_ends_the_process_is_an_error_that_names_it(timeout_s: float | None
                                                                   ) -> None:
    def quits(prompts: list[str], completions: list[str]) -> list[float]:
        if "bc" in completions:
            sys.exit("no answer")
        return [0.0]

    with pytest.raises(RewardError, match="function quits: .*SystemExit: no answer, from response "
                                          "1: prompt 'c', completion 'bc'"):
        FunctionScorer(quits, LetterCodec(), timeout_s=timeout_s)(ROLLOUT)


def test_an_interrupt_that_a_function_raises_in_its_thread_is_its_own() -> None:
    def interrupted(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(RewardError, match="function interrupted: .*KeyboardInterrupt raised"):
        FunctionScorer(interrupted, LetterCodec(), timeout_s=30)(ROLLOUT)


@pytest.mark.parametrize("scores, message", [
    ([1.0], "expected 2 scores, one per completion, got 1"),
    (None, "expected 2 scores, one per completion, got NoneType None"),
    (1.5, "expected 2 scores, one per completion, got float 1.5"),
    ("12", "expected 2 scores, one per completion, got str '12'"),
    ({"a": 1.0, "b": 2.0}, "expected 2 scores, one per completion, got dict"),
    ([1.0, None], r"number for response 1, got None; prompt 'c', completion 'bc'"),
    ([1.0, "x"], r"number for response 1, got 'x'; prompt 'c', completion 'bc'"),
    ([1.0, "0.5"], r"number for response 1, got '0.5'; prompt 'c', completion 'bc'"),
    (torch.tensor(1.0), "expected 2 scores, one per completion, got Tensor"),
    (torch.tensor(1.0).numpy(), "expected 2 scores, one per completion, got ndarray"),
    (torch.ones(2, 2), r"number for response 0, got tensor\(\[1., 1.\]\)"),
    ([1.0, 10**400], r"number for response 1, got 10{3}"),
])
def test_what_cannot_be_scores_is_an_error_that_names_the_function(
    scores: object, message: str
) -> None:
    def wrong(prompts: list[str], completions: list[str]) -> object:
        return scores

    with pytest.raises(RewardError, match=f"reward function wrong: .*{message}"):
        FunctionScorer(wrong, LetterCodec())(ROLLOUT)  # type: ignore[arg-type]


def test_tensors_and_arrays_are_scores() -> None:
    for values in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).numpy(), (1, True)):
        scores = FunctionScorer(lambda p, c, v=values: v, LetterCodec())(ROLLOUT)
        assert scores.tolist() == [float(v) for v in values]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_score_that_is_not_finite_names_the_sample(value: float) -> None:
    with pytest.raises(RewardError, match=r"finite score for response 1.*prompt 'c'.*'bc'"):
        FunctionScorer(lambda p, c: [1.0, value], LetterCodec())(ROLLOUT)


def test_an_exception_names_the_function_and_the_response_that_raises_it() -> None:
    def broken(prompts: list[str], completions: list[str]) -> list[float]:
        return [{"aa": 1.0}[text] for text in completions]

    with pytest.raises(RewardError, match="function broken: .*KeyError: 'bc', from response 1: "
                                          "prompt 'c', completion 'bc'") as caught:
        FunctionScorer(broken, LetterCodec())(ROLLOUT)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_a_timeout_error_of_the_function_is_no_time_limit(timeout_s: float | None) -> None:
    def asks(prompts: list[str], completions: list[str]) -> list[float]:
        if "bc" in completions:
            raise TimeoutError("the server is silent")
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="TimeoutError: the server is silent, from response 1: "
                                          ".*; correct the function"):
        FunctionScorer(asks, LetterCodec(), timeout_s=timeout_s)(ROLLOUT)


def test_an_exception_that_no_response_raises_alone() -> None:
    def pairwise(prompts: list[str], completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="RuntimeError: too many, from 2 responses together"):
        FunctionScorer(pairwise, LetterCodec())(ROLLOUT)


def test_what_cannot_be_called_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="fn: expected a function.*got 42"):
        FunctionScorer(42, LetterCodec())  # type: ignore[arg-type]


def test_ctrl_c_is_not_an_error_of_the_function() -> None:
    def interrupted(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionScorer(interrupted, LetterCodec())(ROLLOUT)


def test_a_function_that_hangs_is_given_up() -> None:
    calls: list[int] = []
    released = Event()

    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        calls.append(len(completions))
        released.wait(20)
        return [0.0] * len(completions)

    begin = monotonic()
    with pytest.raises(RewardError, match="function slow: .*no answer within 0.1 s, from 2 "
                                          "responses together.*raise timeout_s"):
        FunctionScorer(slow, LetterCodec(), timeout_s=0.1)(ROLLOUT)
    released.set()
    assert monotonic() - begin < 10 and calls == [2]
    with pytest.raises(ConfigError, match="timeout_s: expected seconds above 0"):
        FunctionScorer(slow, LetterCodec(), timeout_s=0)


def test_a_time_limit_changes_neither_scores_nor_errors() -> None:
    def ratio(prompts: list[str], completions: list[str]) -> list[float]:
        return [1 / (text != "bc") for text in completions]

    scores = FunctionScorer(lambda p, c: [1.0, 2.0], LetterCodec(), timeout_s=30)(ROLLOUT)
    assert scores.tolist() == [1.0, 2.0]
    with pytest.raises(RewardError, match="ZeroDivisionError.*response 1: prompt 'c'"):
        FunctionScorer(ratio, LetterCodec(), timeout_s=30)(ROLLOUT)


def test_clip_comes_first_and_the_penalty_replaces_the_score() -> None:
    scores = torch.tensor([3.0, -3.0, 0.5, 5.0])
    reasons = ("stop", "stop", "stop", "length")
    assert adjust_scores(scores, reasons).tolist() == [3.0, -3.0, 0.5, 5.0]
    assert adjust_scores(scores, reasons, clip=2.0).tolist() == [2.0, -2.0, 0.5, 2.0]
    assert adjust_scores(scores, reasons, missing_eos_penalty=-4.0).tolist() == [3.0, -3.0, 0.5,
                                                                                -4.0]
    assert adjust_scores(scores, reasons, clip=1.0, missing_eos_penalty=-4.0).tolist() == [
        1.0, -1.0, 0.5, -4.0]
    with pytest.raises(ShapeError, match="one per finish reason"):
        adjust_scores(scores, ("stop",))


def test_reward_model_scorer_is_the_frozen_models_last_value() -> None:
    config = DecoderConfig(family="llama", vocab_size=11, hidden_size=16, num_layers=1, num_heads=2,
                           num_kv_heads=1, head_dim=8, rotary_dim=8, intermediate_size=24,
                           max_positions=32)
    model = scalar_from_causal(new_decoder(config, seed=0), seed=1)
    model.train()
    scorer = RewardModelScorer(model, max_tokens=5)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    scores = scorer(ROLLOUT)
    torch.testing.assert_close(scores, response_scores(model, ROLLOUT, 8192))
    assert scores.shape == (2,) and scores.dtype == torch.float32
