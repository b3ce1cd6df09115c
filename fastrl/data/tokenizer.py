"""Tokenizers made here: byte-level BPE trained on texts, and whole words for small worlds.

Both are saved as Hugging Face folders, which transformers and fastrl load.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fastrl.data.encoder import TextEncoder, load_encoder
from fastrl.errors import ConfigError

PAD, END_OF_TEXT, END_OF_TURN = "<|pad|>", "<|endoftext|>", "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('roles are system, user and assistant') }}
{%- endif -%}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""

WORD_PAD, WORD_END, WORD_UNKNOWN = "<pad>", "<eos>", "<unk>"


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path,
                        special_tokens: Sequence[str] = ()) -> TextEncoder:
    """Train a byte-level BPE tokenizer with a chat template, and save it.

    Ids from 0: `<|pad|>`, `<|endoftext|>` (EOS, also between documents), `<|system|>`, `<|user|>`,
    `<|assistant|>`, `<|end|>` (ends a turn), then `special_tokens`, the 256 bytes and the merges.
    The same texts give the same tokenizer.

    Args:
        texts: What to train on.
        vocab_size: Number of tokens, all of the above included.
        path: Folder to save to.
        special_tokens: Further tokens that never come out of text.
    Raises:
        ConfigError: when `vocab_size` has no room for the special tokens and all bytes.
    """
    special = [PAD, END_OF_TEXT, *ROLE_TOKENS, END_OF_TURN, *special_tokens]
    if vocab_size < len(special) + 256:
        raise ConfigError(f"vocab_size: expected at least {len(special) + 256} (bytes and special "
                          f"tokens), got {vocab_size}; raise vocab_size")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(tokenizer, Path(path), {"eos_token": END_OF_TEXT, "pad_token": PAD},
                 CHAT_TEMPLATE)


def word_tokenizer(words: Iterable[str], path: str | Path) -> TextEncoder:
    """Make a tokenizer whose tokens are whole words split at white space, and save it.

    Ids from 0: `<pad>`, `<eos>`, `<unk>`, then the words in the order given. A word that is not
    among them becomes `<unk>`. Decoding joins words with one space.

    Args:
        words: The words; a repeated one counts once.
        path: Folder to save to.
    Raises:
        ConfigError: when a word is empty, holds white space, or is a special token.
    """
    special = (WORD_PAD, WORD_END, WORD_UNKNOWN)
    vocab = {token: i for i, token in enumerate(special)}
    for word in words:
        if word.split() != [word] or word in special:
            raise ConfigError(f"words: expected words without white space that are not one of "
                              f"{', '.join(special)}, got {word!r}; change the word")
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=WORD_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    names = {"eos_token": WORD_END, "pad_token": WORD_PAD, "unk_token": WORD_UNKNOWN}
    return _save(tokenizer, Path(path), names, None)


def _save(tokenizer: Tokenizer, path: Path, names: dict[str, str], chat_template: str | None
          ) -> TextEncoder:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names,
              "clean_up_tokenization_spaces": False}
    text = json.dumps(config, indent=2) + "\n"
    (path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return load_encoder(path)
