"""Packs: layout, prompts held once, which row predicts which token, budgets of tokens."""

import pytest
import torch

from fastrl.errors import ShapeError
from fastrl.packing import pack_sequences, predict_rows, split_by_tokens

# Three samples of one prompt, one of another, two of a prompt of one token.
SEQUENCES = [[1, 2, 3, 10], [1, 2, 3, 11, 12], [1, 2, 3, 13], [4, 5, 14], [6, 15, 16], [6, 17]]
PROMPT_LENS = [3, 3, 3, 2, 1, 1]


def test_whole_sequences() -> None:
    batch = pack_sequences(SEQUENCES[:2])
    assert batch.token_ids.tolist() == [1, 2, 3, 10, 1, 2, 3, 11, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 9] and batch.max_seqlen == 5
    assert batch.ends.tolist() == [3, 8]
    assert batch.prefixes is None and batch.num_keys == 0 and not batch.is_response.any()


def test_a_shared_prompt_is_held_once() -> None:
    batch = pack_sequences(SEQUENCES, prompt_lens=PROMPT_LENS, share_prefix=True)
    assert batch.token_ids.tolist() == [1, 2, 3, 10, 11, 12, 13, 4, 5, 14, 6, 15, 16, 17]
    assert batch.positions.tolist() == [0, 1, 2, 3, 3, 4, 3, 0, 1, 2, 0, 1, 2, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 7, 10, 11, 13, 14]
    assert batch.prefixes is not None
    assert batch.prefixes.tolist() == [-1, 0, 0, 0, -1, -1, 5, 5]
    assert batch.num_keys == 3 + 4 + 5 + 4 + 3 + 1 + 3 + 2
    assert batch.max_seqlen == 5 and batch.ends.tolist() == [3, 5, 6, 9, 12, 13]
    rows, targets = predict_rows(batch.is_response, batch)
    assert batch.token_ids[targets].tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    assert rows.tolist() == [2, 2, 4, 2, 8, 10, 11, 10]


def test_shared_or_not_the_same_tokens_are_predicted_in_the_same_order() -> None:
    apart = pack_sequences(SEQUENCES, prompt_lens=PROMPT_LENS)
    shared = pack_sequences(SEQUENCES, prompt_lens=PROMPT_LENS, share_prefix=True)
    assert apart.prefixes is None and len(apart.token_ids) == 21 > len(shared.token_ids)
    for batch in (apart, shared):
        rows, targets = predict_rows(batch.is_response, batch)
        assert batch.token_ids[targets].tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
        assert batch.token_ids[rows].tolist() == [3, 3, 11, 3, 5, 6, 15, 6]
        assert batch.positions[rows].tolist() == (batch.positions[targets] - 1).tolist()
        assert batch.token_ids[batch.ends].tolist() == [10, 12, 13, 14, 16, 17]


def test_only_neighbours_with_equal_prompts_share() -> None:
    for sequences, prompt_lens in (([[1, 2, 3], [9, 3], [1, 2, 4]], [2, 1, 2]),
                                   ([[1, 2, 3], [1, 2, 4]], [2, 1])):
        batch = pack_sequences(sequences, prompt_lens=prompt_lens, share_prefix=True)
        assert batch.prefixes is None
        assert len(batch.token_ids) == sum(map(len, sequences))


def test_a_response_without_tokens_ends_where_its_prompt_does() -> None:
    batch = pack_sequences([[1, 2], [1, 2, 3], [1, 2]], prompt_lens=[2, 2, 2], share_prefix=True)
    assert batch.token_ids.tolist() == [1, 2, 3] and batch.ends.tolist() == [1, 2, 1]
    assert [x.tolist() for x in predict_rows(batch.is_response, batch)] == [[1], [2]]


@pytest.mark.parametrize(("sequences", "prompt_lens", "message"), [
    ([], None, "at least one sequence"), ([[1], []], None, r"got lengths \[1, 0\]"),
    ([[1, 2], [3]], [1, 2], "a prompt of 1 to 1 tokens in sequence 1, got 2"),
    ([[1, 2]], [0], "a prompt of 1 to 2 tokens in sequence 0, got 0"),
])
def test_bad_input(sequences: list[list[int]], prompt_lens: list[int] | None,
                   message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        pack_sequences(sequences, prompt_lens=prompt_lens, share_prefix=True)


def test_budgets_without_prompts_keep_the_order() -> None:
    assert split_by_tokens([3, 3, 9, 1], 6) == [[0, 1], [2], [3]]
    assert split_by_tokens([], 6) == []


# Prompts a (3 tokens), b (2), a: a family of 1 + 2 + 1 and one of 4 response tokens.
@pytest.mark.parametrize(("max_tokens", "expected"), [
    (100, [[0, 2, 3, 1]]),     # 3 + 1 + 2 + 1 and 2 + 4
    (13, [[0, 2, 3, 1]]),
    (12, [[0, 2, 3], [1]]),
    (7, [[0, 2, 3], [1]]),     # the family just fits
    (6, [[0, 2], [3], [1]]),   # 3 + 1 + 2, then the prompt again
    (1, [[0], [2], [3], [1]]),
])
def test_budgets_count_a_shared_prompt_once(max_tokens: int, expected: list[list[int]]) -> None:
    prompts = [[7, 7, 7], [8, 8], [7, 7, 7], [7, 7, 7]]
    assert split_by_tokens([4, 6, 5, 4], max_tokens, prompts) == expected


def test_a_family_that_fits_is_not_split_to_fill_a_group() -> None:
    prompts = [[1, 1], [2, 2], [2, 2]]
    assert split_by_tokens([5, 3, 3], 8, prompts) == [[0], [1, 2]]
    assert split_by_tokens([5, 3, 3], 9, prompts) == [[0, 1, 2]]


@pytest.mark.parametrize("max_tokens", [1, 9, 20, 50])
def test_groups_hold_every_row_once_and_keep_the_budget(max_tokens: int) -> None:
    generator = torch.Generator().manual_seed(max_tokens)
    prompts = [[int(p)] * (1 + int(p)) for p in torch.randint(0, 5, (40,), generator=generator)]
    sequences = [p + [9] * int(n) for p, n in
                 zip(prompts, torch.randint(1, 6, (40,), generator=generator), strict=True)]
    groups = split_by_tokens([len(s) for s in sequences], max_tokens, prompts)
    assert sorted(i for group in groups for i in group) == list(range(40))
    for group in groups:
        batch = pack_sequences([sequences[i] for i in group], share_prefix=True,
                               prompt_lens=[len(prompts[i]) for i in group])
        assert len(batch.token_ids) <= max_tokens or len(group) == 1
