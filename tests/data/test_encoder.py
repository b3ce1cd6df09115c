"""TextEncoder: ids equal transformers', and no added token ever comes out of content."""

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastrl.data import TextEncoder, load_encoder
from fastrl.errors import DataError, ModelError

ONE_TURN = [{"role": "user", "content": "What is the capital of France?"}]
THREE_TURNS = [{"role": "user", "content": "Hello there"},
               {"role": "assistant", "content": "Hi! How can I help you?"},
               {"role": "user", "content": "The quick brown fox."}]
ORDINARY = ["Once upon a time there was a girl.", "x", "  two  spaces", "tail ", "línea\tñ 漢字 🙂",
            "[INST] <|angle|> end", "a\nb", "Ａ full width"]
SENTENCE = "Once upon a time, there was a little girl named Lily."
SENTENCE_IDS = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def added_of(encoder: TextEncoder, ids: list[int]) -> Counter[int]:
    return Counter(i for i in ids if i in encoder.added_token_ids)


def transformers_tokenizer(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)


# Ids


def test_known_ids_of_stories260k(required_shared: Path) -> None:
    encoder = load_encoder(required_shared / "models" / "stories260k")
    assert encoder.encode_prompt(SENTENCE) == SENTENCE_IDS
    assert encoder.decode(SENTENCE_IDS) == SENTENCE
    assert encoder.encode_text(SENTENCE) == SENTENCE_IDS[1:]
    assert encoder.encode_completion(" She loved") == [338, 401, 396, 2]
    assert encoder.encode_completion(" She loved", end=False) == [338, 401, 396]
    assert (encoder.bos_token_id, encoder.eos_token_id, encoder.eos_token_ids) == (1, 2, (2,))
    assert (encoder.vocab_size, encoder.max_token_id, encoder.pad_token_id) == (512, 511, 0)
    assert not encoder.has_chat_template
    assert encoder.added_token_ids == {0, 1, 2}
    assert encoder.token_text(2) == "</s>" and encoder.id_of("</s>") == 2


def test_markers_in_text_are_spelled(required_shared: Path) -> None:
    encoder = load_encoder(required_shared / "models" / "stories260k")
    ids = encoder.encode_prompt("<s> </s><unk>")
    assert ids[0] == 1 and not added_of(encoder, ids[1:])
    assert encoder.decode(ids) == "<s> </s><unk>"


@pytest.mark.parametrize("messages", [ONE_TURN, THREE_TURNS], ids=["one_turn", "three_turns"])
def test_prompt_equals_transformers(family: Any, messages: list[dict[str, str]]) -> None:
    expected = transformers_tokenizer(family.folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)
    assert family.encoder.encode_prompt(messages) == expected


def test_conversation_equals_transformers(family: Any) -> None:
    messages = [*THREE_TURNS, {"role": "assistant", "content": "It jumps over the lazy dog."}]
    expected = transformers_tokenizer(family.folder).apply_chat_template(
        messages, return_dict=False)
    ids, _ = family.encoder.encode_conversation(messages)
    decode = family.encoder.decode
    assert decode(ids, False) == decode(expected, False).rstrip()
    if family.name != "vicuna":  # its pieces reach across "ASSISTANT: Hi", where a response begins
        assert ids == expected[:len(ids)]


def test_text_equals_transformers(family: Any) -> None:
    tokenizer = transformers_tokenizer(family.folder)
    compared = 0
    for text in ORDINARY:
        expected = tokenizer.encode(text, add_special_tokens=False)
        if not added_of(family.encoder, expected):
            assert family.encoder.encode_text(text) == expected
            compared += 1
    assert compared >= len(ORDINARY) - 1


def test_one_turn_is_prompt_then_completion(family: Any) -> None:
    for messages in (ONE_TURN, THREE_TURNS):
        answer = {"role": "assistant", "content": "Paris, a large city."}
        ids, loss_mask = family.encoder.encode_conversation([*messages, answer])
        prompt = family.encoder.encode_prompt(messages)
        completion = family.encoder.encode_completion(answer["content"], prompt=messages)
        assert ids == prompt + completion
        assert loss_mask[len(prompt):] == [True] * len(completion)
        assert loss_mask[len(prompt) - 1] is False


def test_targets_are_the_assistants_turns(family: Any) -> None:
    messages = [*THREE_TURNS, {"role": "assistant", "content": "It jumps."}]
    ids, loss_mask = family.encoder.encode_conversation(messages)
    learned = [i for i, m in zip(ids, loss_mask, strict=True) if m]
    end = family.end_of_turn
    text = family.encoder.decode(learned, skip_special_tokens=False).replace(" ", "")
    assert text == f"Hi!HowcanIhelpyou?{end}Itjumps.{end}"
    assert family.encoder.eos_token_ids[0] == family.encoder.id_of(end) == ids[-1]


def test_text_prompt_is_a_user_message(family: Any) -> None:
    encoder = family.encoder
    assert encoder.encode_prompt("Hello") == encoder.encode_prompt(user("Hello"))
    assert encoder.encode_completion("Hi") == encoder.encode_completion("Hi", prompt=user("x"))
    unfinished = encoder.encode_completion("Hi", end=False)
    assert unfinished == encoder.encode_completion("Hi")[:-1]
    plain = load_encoder(family.folder, prompt_format="text")
    assert plain.encode_prompt("Hello")[-len(encoder.encode_text("Hello")):] == (
        encoder.encode_text("Hello"))
    assert plain.encode_prompt(user("Hello")) == encoder.encode_prompt("Hello")


# Text stays text


def hostile_texts(encoder: TextEncoder) -> list[str]:
    markers = [encoder.token_text(i) for i in sorted(encoder.added_token_ids)]
    texts = [form for m in markers for form in (m, f"a{m}b", f" {m} ", m + m, f"\n{m}\n")]
    forged = encoder.decode(encoder.encode_prompt(THREE_TURNS), skip_special_tokens=False)
    return [*texts, "".join(markers), " ".join(markers), forged]


def test_no_added_token_comes_out_of_content(family: Any) -> None:
    encoder = family.encoder
    for text in hostile_texts(encoder):
        for position in ("start", "after_token", "after_text"):
            assert not added_of(encoder, encoder.encode_text(text, position)), text
        template_only = added_of(encoder, encoder.encode_prompt(user("x")))
        assert added_of(encoder, encoder.encode_prompt(user(text))) == template_only
        assert added_of(encoder, encoder.encode_prompt(text)) == template_only
        turns = [THREE_TURNS[0], {"role": "assistant", "content": "y"}]
        hostile = [{**turn, "content": text} for turn in turns]
        assert added_of(encoder, encoder.encode_conversation(hostile)[0]) == (
            added_of(encoder, encoder.encode_conversation(turns)[0]))
        assert added_of(encoder, encoder.encode_completion(text)) == (
            added_of(encoder, encoder.encode_completion("y")))


def test_hostile_text_round_trips(family: Any) -> None:
    for text in hostile_texts(family.encoder):
        text = text.strip()
        assert family.encoder.decode(family.encoder.encode_text(text), False) == text


def test_transformers_would_let_the_markers_through(make_family: Callable[[str], Any]) -> None:
    """The premise: without the separation, forged turns become real ones."""
    family = make_family("chatml")
    tokenizer = transformers_tokenizer(family.folder)
    ids = tokenizer.encode("<|im_end|><think>", add_special_tokens=False)
    assert len(ids) == 2 and added_of(family.encoder, ids).total() == 2


@pytest.fixture(scope="session")
def encode_any(make_family: Callable[[str], Any]) -> list[tuple[TextEncoder, Tokenizer]]:
    """Every family's encoder, and the library's own tokenizer of the same folder."""
    names = ("chatml", "llama3", "mistral", "gemma", "zephyr", "phi3", "vicuna")
    families = [make_family(name) for name in names]
    return [(f.encoder, Tokenizer.from_file(str(f.folder / "tokenizer.json"))) for f in families]


PIECES = ["<s>", "</s>", "<|im_end|>", "<|", "|>", "<unk>", "</", "s>", "<end_of_turn>", "\n", " ",
          "▁", "a", "little", "<0x0A>"]


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_any_text(encode_any: list[tuple[TextEncoder, Tokenizer]], text: str) -> None:
    for encoder, tokenizer in encode_any:
        ids = encoder.encode_text(text)
        assert not added_of(encoder, ids)
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        if not added_of(encoder, expected):
            assert ids == expected


def _word_piece() -> Tokenizer:
    vocab = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s", "[", "]", "cl", "c", "l", "s",
             "##l", "##c", "se", "##p", "un", "##k"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _word_level() -> Tokenizer:
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3, "world": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(("make", "written"), [(_word_piece, "hello world"),
                                               (_word_level, "hello world")])
def test_word_models_give_unknown_at_most(make: Any, written: str, tmp_path: Path,
                                          folder_writer: Callable[..., Path]) -> None:
    added = [AddedToken(t, special=True, normalized=False) for t in ("[UNK]", "[CLS]", "[SEP]")]
    folder = folder_writer(tmp_path / "m", json.loads(make().to_str()), added,
                           {"unk_token": "[UNK]", "cls_token": "[CLS]"}, None)
    encoder = load_encoder(folder)
    assert encoder.encode_text(written) == [3, 4]
    for marker in ("[CLS]", "[SEP]", "[UNK]", "[CLS] [SEP]"):
        assert set(encoder.encode_text(f"hello {marker}")) & encoder.added_token_ids <= {0}
    assert not {1, 2} & set(encoder.encode_prompt("[CLS] [SEP]"))


def test_tokens_that_only_the_config_names(tmp_path: Path, folder_writer: Callable[..., Path],
                                           make_family: Callable[[str], Any]) -> None:
    """Tokens of added_tokens_decoder and named special tokens are added vocabulary too."""
    source = json.loads((make_family("own").folder / "tokenizer.json").read_text())
    size = len(source["model"]["vocab"])
    config = {"eos_token": "<|endoftext|>", "bos_token": {"content": "The"},
              "added_tokens_decoder": {str(size): {"content": "<extra>", "special": True}},
              "extra_special_tokens": ["girl"]}
    template = "{{ messages[0]['content'] }}<extra>"
    folder = folder_writer(tmp_path / "m", source, [], config, template)
    encoder = load_encoder(folder)
    assert encoder.id_of("<extra>") == size == encoder.max_token_id
    assert {size, encoder.id_of("The")} <= encoder.added_token_ids
    for text in ("<extra>", "The", "girl"):
        assert not added_of(encoder, encoder.encode_text(text))
        assert encoder.decode(encoder.encode_text(text)) == text
    assert encoder.encode_prompt("x")[-1] == size


def test_dropout_of_merges_is_off(tmp_path: Path, folder_writer: Callable[..., Path],
                                  make_family: Callable[[str], Any]) -> None:
    source = json.loads((make_family("own").folder / "tokenizer.json").read_text())
    expected = make_family("own").encoder.encode_text("Once upon a time")
    source["model"]["dropout"] = 0.9
    encoder = load_encoder(folder_writer(tmp_path / "m", source, [], {}, None))
    assert all(encoder.encode_text("Once upon a time") == expected for _ in range(5))


def test_half_of_a_surrogate_pair_is_refused(own: TextEncoder) -> None:
    with pytest.raises(DataError, match="expected Unicode text"):
        own.encode_text("\ud800")
    with pytest.raises(DataError, match=r"messages\[0\].content: expected Unicode text"):
        own.encode_prompt(user("\ud800"))


def test_empty_text_has_no_tokens(family: Any) -> None:
    assert family.encoder.encode_text("") == []


# Beginning and end


def test_bos_as_the_tokenizer_adds_it_and_no_eos(tmp_path: Path,
                                                 folder_writer: Callable[..., Path],
                                                 make_family: Callable[[str], Any]) -> None:
    source = json.loads((make_family("own").folder / "tokenizer.json").read_text())
    source["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<|user|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
        "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [3], "tokens": ["<|user|>"]},
                           "<|end|>": {"id": "<|end|>", "ids": [5], "tokens": ["<|end|>"]}}}
    folder = folder_writer(tmp_path / "a", source, [], {"bos_token": "<|user|>"}, None)
    hello = load_encoder(folder).encode_text("Hello")
    assert load_encoder(folder).encode_prompt("Hello") == [3, *hello]
    off = {"bos_token": "<|user|>", "add_bos_token": False}
    folder = folder_writer(tmp_path / "b", source, [], off, None)
    assert load_encoder(folder).encode_prompt("Hello") == hello
    source["post_processor"] = None
    on = {"bos_token": "<|user|>", "add_bos_token": True}
    folder = folder_writer(tmp_path / "c", source, [], on, None)
    assert load_encoder(folder).encode_prompt("Hello") == [3, *hello]


def test_stop_tokens_of_generation_config(tmp_path: Path, folder_writer: Callable[..., Path],
                                          make_family: Callable[[str], Any]) -> None:
    source = json.loads((make_family("own").folder / "tokenizer.json").read_text())
    folder = folder_writer(tmp_path / "m", source, [], {"eos_token": "<|endoftext|>"}, None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert load_encoder(folder).eos_token_ids == (1, 7)


def test_template_without_end_of_turn_ends_with_eos(tmp_path: Path,
                                                    folder_writer: Callable[..., Path],
                                                    make_family: Callable[[str], Any]) -> None:
    source = json.loads((make_family("own").folder / "tokenizer.json").read_text())
    template = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    encoder = load_encoder(folder_writer(
        tmp_path / "m", source, [], {"eos_token": "<|endoftext|>"}, template))
    ids, loss_mask = encoder.encode_conversation([*ONE_TURN, {"role": "assistant", "content": "P"}])
    assert encoder.decode(ids, False) == (
        "user: What is the capital of France?\nassistant: P<|endoftext|>")
    assert encoder.decode([i for i, m in zip(ids, loss_mask, strict=True) if m], False) == (
        " P<|endoftext|>")
    assert ids == encoder.encode_prompt(ONE_TURN) + encoder.encode_completion("P", prompt=ONE_TURN)


def test_messages_without_a_template(required_shared: Path) -> None:
    encoder = load_encoder(required_shared / "models" / "stories260k")
    messages = [{"role": "system", "content": "Be kind."}, *THREE_TURNS]
    assert encoder.decode(encoder.encode_prompt(messages), False) == (
        "<s> Be kind.\n\nHuman: Hello there\n\nAssistant: Hi! How can I help you?</s> \n\n"
        "Human: The quick brown fox.\n\nAssistant:")
    text = load_encoder(required_shared / "models" / "stories260k", prompt_format="chat")
    assert text.decode(text.encode_prompt("Hi")) == "Human: Hi\n\nAssistant:"


# Messages


@pytest.mark.parametrize(("messages", "expected"), [
    ([], "messages: expected a list of messages, got a list of length 0"),
    ([{"role": "user"}], r"messages\[0\].content: expected a text, got nothing"),
    ([{"role": "user", "content": None}], r"messages\[0\].content: expected a text, got null"),
    ([{"role": "<|end|>", "content": "x"}], r"messages\[0\].role: expected one of system"),
    ([{"role": ["user"], "content": "x"}], r"messages\[0\].role: expected one of system"),
    ([{"role": "user", "content": [{"type": "image_url"}]}],
     r"messages\[0\].content\[0\]: expected a text part .* got a part of type 'image_url'"),
    ([{"role": "user", "content": [{"type": "text", "text": ["x"]}]}],
     r"messages\[0\].content\[0\].text: expected a text"),
    ([{"role": "tool", "content": "x"}], "the chat template of .* refuses .* roles tool"),
])
def test_broken_messages(own: TextEncoder, messages: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        own.encode_prompt(messages)


def test_text_parts_are_joined(own: TextEncoder) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert own.encode_prompt([{"role": "user", "content": parts}]) == own.encode_prompt("Hello")


# Folders


def test_saved_folder_is_byte_identical(family: Any, tmp_path: Path) -> None:
    family.encoder.save(tmp_path / "copy")
    names = sorted(p.name for p in family.folder.iterdir())
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == names
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (family.folder / name).read_bytes()
    again = load_encoder(tmp_path / "copy")
    again.save(tmp_path / "copy")
    assert again.encode_prompt(THREE_TURNS) == family.encoder.encode_prompt(THREE_TURNS)


@pytest.mark.parametrize(("files", "expected"), [
    (None, "expected a model folder with tokenizer.json, got nothing"),
    ({}, r"expected a tokenizer \(tokenizer.json\), found none"),
    ({"tokenizer.json": "{"}, "tokenizer.json: expected valid JSON"),
    ({"tokenizer.json": "[]"}, "tokenizer.json: expected a JSON object, got list"),
    ({"tokenizer.json": "{}"}, "expected a tokenizer that the package tokenizers can run"),
    ({"tokenizer.json": None, "tokenizer_config.json": "\xff"}, "tokenizer_config.json"),
    ({"tokenizer.json": None, "chat_template.jinja": "{% if %}"},
     "expected a Jinja chat template"),
    ({"tokenizer.json": None, "tokenizer_config.json": '{"chat_template": 3}'},
     "expected chat_template to be a text"),
    ({"tokenizer.json": None, "tokenizer_config.json":
      '{"added_tokens_decoder": {"9999": {"content": "<far>"}}}'},
     "expected the added token '<far>' at id 9999"),
])
def test_broken_folders(tmp_path: Path, make_family: Callable[[str], Any],
                        files: dict[str, str | None] | None, expected: str) -> None:
    folder = tmp_path / "m"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            source = (make_family("own").folder / "tokenizer.json").read_text()
            (folder / name).write_text(source if text is None else text, encoding="latin-1"
                                       if text == "\xff" else "utf-8")
    with pytest.raises(ModelError, match=expected):
        load_encoder(folder)


def test_template_places(tmp_path: Path, folder_writer: Callable[..., Path],
                         make_family: Callable[[str], Any]) -> None:
    """tokenizer_config.json and chat_template.json hold templates in older folders."""
    source = json.loads((make_family("own").folder / "tokenizer.json").read_text())
    template = "{{ messages[0]['content'] }}!"
    named = [{"name": "rag", "template": "?"}, {"name": "default", "template": template}]
    for i, config in enumerate([{"chat_template": template}, {"chat_template": named}, {}]):
        folder = folder_writer(tmp_path / str(i), copy.deepcopy(source), [], config, None)
        if not config:
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        encoder = load_encoder(folder)
        assert encoder.decode(encoder.encode_prompt("Hi")) == "Hi!"


def test_slow_tokenizer_goes_through_transformers(tmp_path: Path) -> None:
    """A GPT-2 folder from before tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["hello world"], trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    encoder = load_encoder(tmp_path)
    assert encoder.decode(encoder.encode_text("hello <|endoftext|>")) == "hello <|endoftext|>"
    assert 0 in encoder.added_token_ids
    assert 0 not in encoder.encode_text("hello <|endoftext|>")
