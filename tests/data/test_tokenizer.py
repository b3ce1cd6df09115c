"""Tokenizers made here: ids, determinism, and loading in transformers."""

from pathlib import Path
from typing import Any

import pytest

from fastrl.data import TextEncoder, train_bpe_tokenizer, word_tokenizer
from fastrl.errors import ConfigError

TEXTS = ["The quick brown fox jumps over the lazy dog.", "The dog sleeps, the fox does not."] * 3


def test_ids_of_a_bpe_tokenizer(tmp_path: Path) -> None:
    encoder = train_bpe_tokenizer(TEXTS, 300, tmp_path, special_tokens=["<|extra|>"])
    names = ["<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
             "<|extra|>"]
    assert [encoder.id_of(name) for name in names] == list(range(7))
    assert encoder.added_token_ids == set(range(7))
    assert (encoder.vocab_size, encoder.max_token_id) == (300, 299)
    assert (encoder.eos_token_id, encoder.eos_token_ids, encoder.pad_token_id) == (1, (5, 1), 0)
    assert encoder.has_chat_template and encoder.bos_token_id is None
    assert encoder.decode(encoder.encode_text("漢字 \x00 🙂")) == "漢字 \x00 🙂"
    assert len(encoder.encode_text("The quick brown fox")) < 15


def test_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe_tokenizer(iter(TEXTS), 300, tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_vocabulary_needs_room_for_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size: expected at least 262 .* got 261"):
        train_bpe_tokenizer(TEXTS, 261, tmp_path)


def test_ids_of_a_word_tokenizer(tmp_path: Path) -> None:
    encoder = word_tokenizer(["red", "blue", "red", "."], tmp_path)
    assert encoder.encode_text("blue red .") == [4, 3, 5]
    assert encoder.decode([4, 3, 5, 1]) == "blue red ."
    assert encoder.encode_text("green <eos> <pad>") == [2, 2, 2]  # all unknown words
    assert encoder.encode_prompt("red") + encoder.encode_completion("blue") == [3, 4, 1]
    assert (encoder.vocab_size, encoder.eos_token_ids, encoder.pad_token_id) == (6, (1,), 0)


@pytest.mark.parametrize("word", ["", "two words", "<eos>", " x"])
def test_words_that_cannot_be_tokens(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="words: expected words without white space"):
        word_tokenizer([word], tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_transformers_loads_it(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    encoder: TextEncoder
    if kind == "bpe":
        encoder = train_bpe_tokenizer(TEXTS, 300, tmp_path)
    else:
        encoder = word_tokenizer(["the", "fox", "sleeps"], tmp_path)
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer: Any = loader.from_pretrained(tmp_path)
        ids = tokenizer("the fox sleeps").input_ids
        assert ids == encoder.encode_text("the fox sleeps")
        assert tokenizer.decode(ids) == encoder.decode(ids) == "the fox sleeps"
        assert tokenizer.eos_token_id == encoder.eos_token_id
        assert tokenizer.pad_token_id == encoder.pad_token_id
    if kind == "bpe":
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "The"}]
        assert encoder.encode_prompt(messages) == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False)
