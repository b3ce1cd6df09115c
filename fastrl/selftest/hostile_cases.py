"""The hostile files themselves, written by code: safetensors, JSON, pickles, YAML, data."""

import gzip
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8,
          "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
          "num_attention_heads": 1, "max_position_embeddings": 8, "tie_word_embeddings": True}
OTHER = {**CONFIG, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"],
         "num_key_value_heads": 1, "tie_word_embeddings": False}
CODE = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n"
_TURN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Case:
    """One hostile folder or file and how it is opened."""

    name: str
    kind: str
    write: Callable[[Path], Path]
    """Writes into a folder and returns what is opened."""

    def open(self, path: Path) -> None:
        """Open it as fastrl would."""
        _OPENERS[self.kind](path)


def good_model(folder: Path, other: bool = False) -> None:
    """A tiny model that loads, through transformers when `other`; makes the imports happen."""
    from fastrl.models import decoder_config, load_causal_lm, new_decoder, save_causal_lm

    if not other:
        model = new_decoder(decoder_config("llama", vocab_size=8, hidden_size=4, num_layers=1,
                                           num_heads=1, intermediate_size=4, max_positions=8),
                            seed=0)
        save_causal_lm(model, folder)
        load_causal_lm(folder)
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in OTHER.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **settings)
                                     ).save_pretrained(folder)
    load_causal_lm(folder)


def good_tokenizer(folder: Path) -> None:
    """A tokenizer that loads."""
    from fastrl.data import train_bpe_tokenizer, word_tokenizer

    word_tokenizer(["a", "b"], folder)
    train_bpe_tokenizer(["a b"], 300, folder / "bpe").encode_prompt("a")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder / "bpe")


def _open_model(path: Path) -> None:
    from fastrl.models import load_causal_lm

    load_causal_lm(path)


def _open_tokenizer(path: Path) -> None:
    from fastrl.data import load_encoder

    load_encoder(path).encode_prompt([{"role": "user", "content": "a"}])


def _open_recipe(path: Path) -> None:
    from fastrl.recipe import load_recipe

    load_recipe(path)


def _open_data(path: Path) -> None:
    from fastrl.data import read_rows

    for row in read_rows(path):
        row.text("prompt")


_OPENERS: dict[str, Callable[[Path], None]] = {
    "model": _open_model, "tokenizer": _open_tokenizer, "recipe": _open_recipe, "data": _open_data}


def _safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


_EMBEDDING = "model.embed_tokens.weight"


def _model(name: str, config: Any = CONFIG, weights: bytes | None = None,
           **files: bytes) -> Case:
    """A model folder; names of further files have `__` for the dot."""
    def write(folder: Path) -> Path:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "config.json").write_bytes(text)
        if weights is not None:
            (folder / "model.safetensors").write_bytes(weights)
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_bytes(content)
        return folder

    return Case(name, "model", write)


def _tokenizer(name: str, template: str | None = None, config: Any = None,
               source: bytes | None = None, **files: bytes) -> Case:
    def write(folder: Path) -> Path:
        if source is None and template is not None:
            good_tokenizer(folder)
        elif source is not None:
            (folder / "tokenizer.json").write_bytes(source)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_bytes(content)
        return folder

    return Case(name, "tokenizer", write)


def _file(name: str, kind: str, file: str, content: bytes) -> Case:
    def write(folder: Path) -> Path:
        (folder / file).write_bytes(content)
        return folder / file

    return Case(name, kind, write)


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "d.jsonl")
    return folder / "d.jsonl"


def _adapter_cycle(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)}))
    return folder


def _adapter_of_the_hub(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/model"}))
    return folder


_INDEX = "model__safetensors__index__json"
_AUTO = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model",
                      "AutoTokenizer": ["evil.Tokenizer", None]}}
_PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."  # a pickle that runs a command
_STAGES = "name: a\nstages:\n- {name: s, kind: sft, model_name_or_path: m, data: [d]"

CASES: tuple[Case, ...] = (
    _model("pickled_bin", pytorch_model__bin=_PICKLE),
    _model("pickled_pt", model__pt=_PICKLE),
    _model("pickle_named_safetensors", weights=_PICKLE),
    _model("zip_named_safetensors", weights=b"PK\x03\x04" + b"\0" * 64),
    _model("auto_map", {**OTHER, **_AUTO, "model_type": "evil"}, evil__py=CODE.encode()),
    _model("auto_map_of_a_known_type", {**OTHER, **_AUTO}, evil__py=CODE.encode()),
    _model("trust_remote_code_in_config", {**OTHER, **_AUTO, "trust_remote_code": True,
                                           "model_type": "evil"}, evil__py=CODE.encode()),
    _model("kernel_in_config", {**OTHER, "_attn_implementation_internal": "someone/kernel"}),
    _model("attention_in_config", {**OTHER, "attn_implementation": "someone/kernel"}),
    _model("custom_pipelines", {**OTHER, "model_type": "evil",
                                "custom_pipelines": {"x": {"impl": "evil.P"}}},
           evil__py=CODE.encode()),
    _model("model_file", {**CONFIG, "model_type": "evil", "model_file": "evil.py"},
           evil__py=CODE.encode()),
    _model("quantised", {**CONFIG, "quantization_config": {"quant_method": "evil"}}),
    _model("header_longer_than_the_file", weights=_safetensors({}, length=2**63 - 1)),
    _model("header_of_gigabytes", weights=_safetensors({}, length=2**32)),
    _model("header_not_json", weights=_safetensors(b"{" * 100)),
    _model("header_nested", weights=_safetensors(b"[" * 100_000)),
    _model("offsets_overlap", weights=_safetensors(
        {_EMBEDDING: _tensor([8, 4], 0, 128), "b": _tensor([8, 4], 64, 192)}, b"\0" * 192)),
    _model("offsets_beyond_the_file", weights=_safetensors(
        {_EMBEDDING: _tensor([8, 4], 2**40, 2**40 + 128)}, b"\0" * 128)),
    _model("shape_beyond_the_data", weights=_safetensors(
        {_EMBEDDING: _tensor([2**40, 2**40], 0, 128)}, b"\0" * 128)),
    _model("shape_not_of_the_config", weights=_safetensors(
        {_EMBEDDING: _tensor([4, 8], 0, 128)}, b"\0" * 128)),
    _model("shard_outside", **{_INDEX: b'{"weight_map": {"a": "../good/model.safetensors"}}'}),
    _model("shard_absolute", **{_INDEX: b'{"weight_map": {"a": "/etc/passwd"}}'}),
    _model("shard_not_text", **{_INDEX: b'{"weight_map": {"a": [1]}}'}),
    _model("config_nested", b'{"a": ' + b"[" * 100_000),
    _model("config_key_twice", b'{"model_type": "llama", "model_type": "evil"}'),
    _model("config_not_utf8", b'{"model_type": "\xff"}'),
    _model("config_of_a_billion_layers", {**CONFIG, "num_hidden_layers": 10**9},
           _safetensors({_EMBEDDING: _tensor([8, 4], 0, 128)}, b"\0" * 128)),
    _model("config_of_a_huge_vocabulary", {**CONFIG, "vocab_size": 2**62},
           _safetensors({_EMBEDDING: _tensor([8, 4], 0, 128)}, b"\0" * 128)),
    _model("config_with_a_number_of_5000_digits", b'{"vocab_size": ' + b"1" * 5000 + b"}"),
    Case("adapter_that_is_its_own_base", "model", _adapter_cycle),
    Case("adapter_with_a_base_on_the_hub", "model", _adapter_of_the_hub),
    _tokenizer("tokenizer_auto_map", config={**_AUTO, "tokenizer_class": "Evil"},
               vocab__json=b"{}", evil__py=CODE.encode()),
    _tokenizer("tokenizer_pickle", source=_PICKLE),
    _tokenizer("tokenizer_key_twice", source=b'{"version": "1.0", "version": "1.0"}'),
    _tokenizer("tokenizer_nested", source=b"[" * 100_000),
    _tokenizer("tokenizer_of_an_unknown_model", source=b'{"model": {"type": "Evil"}}'),
    _tokenizer("template_reads_attributes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    _tokenizer("template_reaches_globals", "{{ cycler.__init__.__globals__.os.popen('id') }}"),
    _tokenizer("template_imports", "{% import 'os' as os %}{{ os.system('id') }}"),
    _tokenizer("template_without_end",
               "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    _tokenizer("template_that_fills_memory", "{% set n = namespace(x='ab') %}{% for i in range(40) "
               "%}{% set n.x = n.x + n.x %}{% endfor %}" + _TURN),
    _file("recipe_object", "recipe", "r.yaml", b"name: !!python/object/apply:os.system ['id']\n"),
    _file("recipe_name", "recipe", "r.yaml", b"name: !!python/name:os.system\n"),
    _file("recipe_module", "recipe", "r.yaml", b"name: !!python/module:evil\n"),
    _file("recipe_key_twice", "recipe", "r.yaml", b"name: a\nname: b\n"),
    _file("recipe_aliases", "recipe", "r.yaml",
          b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nname: *c\n"),
    _file("recipe_nested", "recipe", "r.yaml", b"[" * 5_000),
    _file("recipe_names_code", "recipe", "r.yaml", f"{_STAGES}, class_path: os.system}}".encode()),
    _file("recipe_reaches_out", "recipe", "r.yaml",
          b"name: a\nstages:\n- {name: ../../x, kind: sft, model_name_or_path: m, data: [d]}\n"),
    _file("data_bomb", "data", "d.jsonl.gz", gzip.compress(b"\n" * 8_000_000)),
    _file("data_nested", "data", "d.jsonl", b'{"prompt": ' + b"[" * 100_000),
    _file("data_key_twice", "data", "d.jsonl", b'{"prompt": "a", "prompt": "b"}\n'),
    _file("data_pickle", "data", "d.jsonl", _PICKLE),
    _file("data_not_parquet", "data", "d.parquet", b"PAR1" + _PICKLE + b"PAR1"),
    _file("data_surrogate", "data", "d.jsonl", b'{"prompt": "\\ud800"}\n'),
    Case("data_pipe", "data", _pipe),
)
