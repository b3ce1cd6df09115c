"""Responses of a model, written to a data file as text and read again: the same tokens."""

import pytest
import torch

from fastrl.data import TextEncoder, load_encoder
from fastrl.rewards import decode_continuation
from fastrl.types import Prompt, Rollout

ANSWER = "The quick brown fox"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def text_of(encoder: TextEncoder, prompt: Prompt, response: list[int]) -> str:
    mask = torch.ones(1, len(response), dtype=torch.bool)
    ids = [*prompt.token_ids, *response]
    rollout = Rollout(
        token_ids=torch.tensor(ids), cu_seqlens=torch.tensor([0, len(ids)]),
        prompt_lens=torch.tensor([len(prompt.token_ids)]), response_ids=torch.tensor([response]),
        response_mask=mask, rollout_logprobs=torch.zeros(mask.shape),
        entropy=torch.zeros(mask.shape), finish_reasons=("stop",))
    return decode_continuation(rollout, 0, encoder, prompt)


def test_answers_in_a_chat_template_are_read_as_they_were_written(family) -> None:
    encoder = family.encoder
    prompt = Prompt(tuple(encoder.encode_prompt(QUESTION)), "?", row={"messages": QUESTION})
    response = encoder.encode_completion(ANSWER, prompt=QUESTION)
    assert text_of(encoder, prompt, response) == ANSWER
    assert text_of(encoder, prompt, response[:-1]) == ANSWER  # without the end of the turn


@pytest.mark.parametrize("answer", [ANSWER, " " + ANSWER])
def test_continued_text_keeps_its_space(family, answer: str) -> None:
    encoder = load_encoder(family.folder, prompt_format="text")
    question = "What is the capital of France?"
    prompt = Prompt(tuple(encoder.encode_prompt(question)), question, row={"prompt": question})
    assert text_of(encoder, prompt, encoder.encode_completion(answer)) == answer
