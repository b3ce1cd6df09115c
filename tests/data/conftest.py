"""Small tokenizers of every model type, with chat templates in the style of eight families."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from fastrl.data import TextEncoder, load_encoder, train_bpe_tokenizer

CORPUS = [
    "Once upon a time there was a little girl named Lily who loved to play in the park.",
    "What is the capital of France? The capital of France is Paris, a large city.",
    "user: hello there\nassistant: Hi! How can I help you today?\n\nI have 42 questions.",
    "System message. <|angle|> [brackets] {braces} 'quotes' \"double\" / end </s> im_start im_end",
    "The quick brown fox jumps over the lazy dog; 0123456789 times, and then it sleeps.",
] * 4

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
LLAMA3 = """\
{%- for message in messages -%}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
    + message['content'] | trim + '<|eot_id|>' -%}
{%- if loop.index0 == 0 -%}{%- set content = bos_token + content -%}{%- endif -%}
{{ content }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate user and assistant') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else -%}{{ ' ' + message['content'] + eos_token }}
{%- endif -%}{%- endfor -%}"""
GEMMA = """\
{{ bos_token }}{% for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endgeneration %}

{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI3 = """\
{{ bos_token }}{% for message in messages %}
{{- '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""
VICUNA = """\
{{ bos_token }}A chat between a user and an assistant.{% for message in messages %}
{%- if message['role'] == 'user' -%}{{ ' USER: ' + message['content'] }}
{%- else -%}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"""


@dataclass(frozen=True)
class Family:
    """A tokenizer folder and what is known about it."""

    name: str
    folder: Path
    encoder: TextEncoder
    end_of_turn: str


def tokens(*texts: str, special: bool = True, **flags: bool) -> list[AddedToken]:
    """Added tokens with the same flags."""
    return [AddedToken(text, special=special, normalized=False, **flags) for text in texts]


def byte_level(in_vocab: tuple[str, ...] = ()) -> dict[str, Any]:
    """Byte-level BPE; `in_vocab` are entries that its model can find as whole words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    value["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True}
    value["model"]["ignore_merges"] = bool(in_vocab)
    for text in in_vocab:
        value["model"]["vocab"][text] = len(value["model"]["vocab"])
    return value


SP_DECODER = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}]}
SP_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def sentencepiece_bpe(prefix: bool, in_vocab: tuple[str, ...]) -> dict[str, Any]:
    """BPE with byte fallback; control tokens and bytes are part of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, show_progress=False, max_token_length=8))
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    learned = [*in_vocab, *(f"<0x{i:02X}>" for i in range(256)), *value["model"]["vocab"]]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(learned))}
    merges = value["model"]["merges"]
    for text in in_vocab:  # a converter of SentencePiece makes merges for every piece it can
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab:
                merges.append([text[:cut], text[cut:]])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    value["pre_tokenizer"] = None
    value["normalizer"] = {"type": "Sequence", "normalizers": steps}
    value["model"] |= {"vocab": vocab, "merges": merges, "byte_fallback": True,
                       "unk_token": "<unk>", "fuse_unk": True}
    value["decoder"] = json.loads(json.dumps(SP_DECODER))
    if prefix:
        value["decoder"]["decoders"].append(SP_STRIP)
    return value


def unigram(scheme: str, in_vocab: tuple[str, ...]) -> dict[str, Any]:
    """Unigram with byte fallback; control tokens have score 0, the best there is."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, unk_token="<unk>"))
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    learned = [[text, score] for text, score in value["model"]["vocab"] if text not in in_vocab]
    bytes_ = [[f"<0x{i:02X}>", -20.0] for i in range(256)]
    value["model"] |= {"vocab": [[text, 0.0] for text in in_vocab] + bytes_ + learned,
                       "unk_id": in_vocab.index("<unk>"), "byte_fallback": True}
    value["decoder"] = json.loads(json.dumps(SP_DECODER))
    value["decoder"]["decoders"].append(SP_STRIP)
    return value


def save_folder(folder: Path, tokenizer_json: dict[str, Any], added: list[AddedToken],
                config: dict[str, Any], template: str | None) -> Path:
    """Write a tokenizer folder in the Hugging Face layout."""
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json))
    tokenizer.add_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _chatml(folder: Path) -> str:
    added = tokens("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added += tokens("<think>", "</think>", "<tool_call>", special=False)
    save_folder(folder, byte_level(), added,
                {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML)
    return "<|im_end|>"


def _llama3(folder: Path) -> str:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>", "little")  # "little": an ordinary word that somebody added
    save_folder(folder, byte_level(in_vocab=names[:-1]), tokens(*names),
                {"bos_token": names[0], "eos_token": names[1]}, LLAMA3)
    return "<|eot_id|>"


def _mistral(folder: Path) -> str:
    names = ("<unk>", "<s>", "</s>")
    save_folder(folder, sentencepiece_bpe(True, names), tokens(*names),
                {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
                 "add_bos_token": True}, MISTRAL)
    return "</s>"


def _gemma(folder: Path) -> str:
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁")
    added = tokens(*names[:6]) + tokens(*names[6:], special=False)
    save_folder(folder, sentencepiece_bpe(False, names), added,
                {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>",
                 "unk_token": "<unk>"}, GEMMA)
    return "<end_of_turn>"


def _zephyr(folder: Path) -> str:
    names = ("<unk>", "<s>", "</s>")
    save_folder(folder, unigram("first", names), tokens(*names),
                {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, ZEPHYR)
    return "</s>"


def _phi3(folder: Path) -> str:
    names = ("<unk>", "<s>", "</s>")
    added = tokens(*names[:2]) + tokens("</s>", rstrip=True)
    added += tokens("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>",
                    rstrip=True)
    save_folder(folder, sentencepiece_bpe(True, names), added,
                {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"}, PHI3)
    return "<|end|>"


def _vicuna(folder: Path) -> str:
    names = ("<unk>", "<s>", "</s>")
    save_folder(folder, unigram("always", names), tokens(*names),
                {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, VICUNA)
    return "</s>"


def _own(folder: Path) -> str:
    train_bpe_tokenizer(CORPUS, 400, folder)
    return "<|end|>"


FAMILIES: dict[str, Callable[[Path], str]] = {
    "chatml": _chatml, "llama3": _llama3, "mistral": _mistral, "gemma": _gemma,
    "zephyr": _zephyr, "phi3": _phi3, "vicuna": _vicuna, "own": _own,
}


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Builds a family by name, once."""
    built: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in built:
            folder = tmp_path_factory.mktemp(name) / "model"
            end_of_turn = FAMILIES[name](folder)
            built[name] = Family(name, folder, load_encoder(folder), end_of_turn)
        return built[name]

    return make


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest, make_family: Callable[[str], Family]) -> Family:
    """Each of the eight chat-template families."""
    return make_family(request.param)


@pytest.fixture(scope="session")
def own(make_family: Callable[[str], Family]) -> TextEncoder:
    """Our own byte-level tokenizer with its chat template."""
    return make_family("own").encoder


@pytest.fixture(scope="session")
def folder_writer() -> Callable[..., Path]:
    """Writes a tokenizer folder from the parsed tokenizer.json."""
    return save_folder
