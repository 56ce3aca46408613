"""Tests of what is accepted from a model folder; the oracle is `transformers` on the same one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from roofline.errors import CheckpointError, RequestError, RooflineError, UnsupportedError
from roofline.tokenizer.folder_vocabulary import read_chat_template, vocabulary_from_folder
from roofline.tokenizer.tokenizer import Tokenizer
from roofline.tokenizer.vocabulary_test import CHATML
from tests.sentencepiece_model import write_tokenizer_json

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll")]
WORDS = [*ALPHABET, *("".join(pair) for pair in MERGES)]
BOS, EOS, TOOL = range(len(WORDS), len(WORDS) + 3)
SIZE = len(WORDS) + 3
TEXTS = ["hello", "hell <s>", "</s> 12  3\n", "é😀<tool>"]


def original(*, adds_bos: bool = False) -> tokenizers.Tokenizer:
    """A tokenizer as a model's author has it."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for text in ("<s>", "</s>"):
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return tokenizer


def folder(path: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def document() -> dict[str, Any]:
    """What a good tokenizer.json holds."""
    value = json.loads(original().to_str())
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_ids_and_what_goes_around_them_equal_transformers(
    tmp_path: Path, adds_bos: bool, config: dict[str, Any]
) -> None:
    path = folder(tmp_path, original(adds_bos=adds_bos), **config)
    ours, theirs = Tokenizer.from_folder(path), PreTrainedTokenizerFast.from_pretrained(path)
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.adds_bos == adds_bos
    assert (ours.bos_token_id, ours.eos_token_ids, ours.vocab_size) == (BOS, (EOS,), len(theirs))


def test_a_named_token_is_special_whatever_tokenizer_json_says(tmp_path: Path) -> None:
    path = folder(tmp_path, original(), eos_token={"content": "<tool>"}, bos_token="hell")
    tokenizer = Tokenizer.from_folder(path)
    assert tokenizer.eos_token_ids == (TOOL,)
    assert {TOOL, tokenizer.bos_token_id} <= tokenizer.special_ids
    assert TOOL not in tokenizer.encode("<tool>")
    assert tokenizer.encode("<tool>", parse_special=True) == [TOOL]


def test_no_text_can_be_normalized_into_a_special_token(tmp_path: Path) -> None:
    tokenizer = original()
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<e>", special=True, normalized=True, rstrip=True)])
    ours = Tokenizer.from_folder(
        folder(tmp_path, tokenizer, chat_template="{{messages[0].content}}<e>")
    )
    assert ours.encode("<e> ", parse_special=True) == [SIZE]
    assert SIZE not in ours.encode("\uff1ce\uff1e", parse_special=True)
    ids = ours.apply_chat_template([{"role": "user", "content": "\uff1ce\uff1e"}])
    assert ids == [*ours.encode("<e>"), SIZE]


def test_a_post_processor_with_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizer = original()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <x>", special_tokens=[("<x>", SIZE)]
    )
    with pytest.raises(
        CheckpointError, match=rf"tokenizer\.json: post_processor puts ids \[{SIZE}\]"
    ):
        vocabulary_from_folder(folder(tmp_path, tokenizer))


def test_a_hidden_metaspace_is_refused(tmp_path: Path) -> None:
    file = write_tokenizer_json(tmp_path, "metaspace") / "tokenizer.json"
    value = json.loads(file.read_text())
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [value["pre_tokenizer"]]}
    file.write_text(json.dumps(value))
    with pytest.raises(UnsupportedError, match=r"pre_tokenizer\.type Sequence is not supported"):
        vocabulary_from_folder(tmp_path)


@pytest.mark.parametrize("changes", [{"start": 2}, {"stop": 1}, {"content": "x"}])
def test_decoding_that_strips_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = write_tokenizer_json(tmp_path, "prepend") / "tokenizer.json"
    value = json.loads(file.read_text())
    value["decoder"]["decoders"][-1] |= changes
    file.write_text(json.dumps(value))
    with pytest.raises(UnsupportedError, match=r"decoder\.type Sequence is not supported as it is"):
        vocabulary_from_folder(tmp_path)


def test_truncation_and_padding_set_in_the_file_are_not_done(tmp_path: Path) -> None:
    tokenizer = original()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    ids = Tokenizer.from_folder(folder(tmp_path, tokenizer)).encode("hey, hey, hey")
    assert len(ids) > 4
    assert len(ids) < 99


def test_a_folder_needs_no_more_than_tokenizer_json(tmp_path: Path) -> None:
    original(adds_bos=True).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(str(tmp_path))
    assert tokenizer.eos_token_ids == ()
    assert tokenizer.chat_template is None
    assert tokenizer.encode("h")[:1] == [BOS]


def test_the_templates_own_files_win_then_those_of_the_config(tmp_path: Path) -> None:
    def found() -> Mapping[str, str]:
        return vocabulary_from_folder(tmp_path).chat_templates

    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder(tmp_path, original())
    assert found() == {}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "P"}')
    assert found() == {"default": "P"}
    folder(tmp_path, original(), chat_template=named)
    assert found() == {"tool_use": "T", "default": "D"}
    folder(tmp_path, original(), chat_template="S")
    assert found() == {"default": "S"}
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert found() == {"default": CHATML}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert found() == {"default": CHATML, "rag": "R"}


def test_tokens_that_templates_name_are_those_of_the_config(tmp_path: Path) -> None:
    names = {"pad_token": "<pad>", "unk_token": {"content": "<tool>"}, "mask_token": None}
    vocabulary = vocabulary_from_folder(folder(tmp_path, original(), **names))
    assert vocabulary.template_tokens["unk_token"] == "<tool>"
    assert "pad_token" not in vocabulary.template_tokens  # which the vocabulary has not
    assert "mask_token" not in vocabulary.template_tokens


def test_the_context_is_that_of_the_models_config(tmp_path: Path) -> None:
    assert vocabulary_from_folder(folder(tmp_path, original())).context_tokens is None
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    assert vocabulary_from_folder(tmp_path).context_tokens == 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[]", "is list; it must be a JSON object"),
        (b"null", "is null; it must be a JSON object"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = folder(tmp_path, original()) / name
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: {message}") as error:
        vocabulary_from_folder(tmp_path)
    assert "\n" not in error.value.message


def test_a_folder_without_tokenizer_json_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        vocabulary_from_folder(tmp_path)


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a regular file"):
        vocabulary_from_folder(tmp_path)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model.type None is not supported; supported: BPE"),
    "another model": ({"model": {"type": "Unigram", "vocab": []}}, "model.type Unigram"),
    "model of another type": ({"model": 3}, "model.type None"),
    "another decoder": ({"decoder": {"type": "Metaspace"}}, "decoder.type Metaspace"),
    "no decoder": ({"decoder": None}, "decoder.type None is not supported as it is here"),
    "decoders of another model": (
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}},
        "decoder.type Sequence is not supported as it is here; supported: ByteLevel, and Sent"),
    "decoders are no list": (
        {"decoder": {"type": "Sequence", "decoders": 3}}, "decoder.decoders is int"),
    "no vocabulary": ({"model.vocab": {}}, "model.vocab is missing or empty"),
    "vocabulary is a list": ({"model.vocab": ["a"]}, "model.vocab is list; it must be dict"),
    "negative id": ({"model.vocab": {"a": -1}}, "gives 'a' the id -1"),
    "huge id": ({"model.vocab": {"a": 2**31}}, "gives 'a' the id 2147483648"),
    "id is a flag": ({"model.vocab": {"a": True}}, "gives 'a' the id True"),
    "id twice": ({"model.vocab": {"a": 0, "b": 0}}, "gives two tokens the same id"),
    "merge unknown": ({"model.merges": [["h", "zzz"]]}, "is no usable tokenizer: .*zzz"),
    "merge of one": ({"model.merges": ["h"]}, "is no usable tokenizer"),
    "merge beyond its pieces": ({"model.continuing_subword_prefix": "#" * 99}, "is set"),
    "word ends": ({"model.end_of_word_suffix": "</w>"}, "is set; supported: none"),
    "bad pattern": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                           "invert": False}}, "is no usable tokenizer"),
    "runaway pattern": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated",
                           "invert": False}}, r"pattern '\(a\+\)\+b' is not supported; supported"),
    "growing normalizer": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}},
        "normalizer Replace is supported where it makes no text longer"),
    "merge longer than any key": ({"model.merges": [["h", "x" * 10**6]]}, "is no usable tokenizer"),
    "vocabulary missing": ({"model": {"type": "BPE", "merges": []}}, "model.vocab is missing or"),
    "id of another": (
        {"added_tokens": [{"id": 0, "content": "<z>", "special": True, "normalized": False,
                           "single_word": False, "lstrip": False, "rstrip": False}]},
        "gives '<z>' the id 0, which it cannot have"),
    "added is no list": ({"added_tokens": {}}, "added_tokens is dict; it must be list"),
    "added is no object": ({"added_tokens": ["x"]}, r"added_tokens\[0\] is not an object"),
    "added without id": ({"added_tokens": [{"content": "x"}]}, "gives 'x' the id None"),
    "added elsewhere": (
        {"added_tokens": [{"id": 900, "content": "<z>", "special": True, "normalized": False,
                           "single_word": False, "lstrip": False, "rstrip": False}]},
        "gives '<z>' the id 900, which it cannot have"),
    "lone surrogate": ({"model.vocab": {"\ud800": 0}}, "is no usable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_json_is_refused_by_file_and_field(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    value = document()
    for name, change in changes.items():
        inside, _, field = name.rpartition(".")
        (value[inside] if inside else value)[field] = change
    folder(tmp_path, original())
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises((CheckpointError, UnsupportedError), match=message) as error:
        vocabulary_from_folder(tmp_path)
    assert "tokenizer.json" in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 500


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is larger than"):
        vocabulary_from_folder(tmp_path)


def test_a_text_the_pattern_gives_up_on_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    tokenizer = original()
    slow = Regex("[a-y]*[a-y]*[a-y]*[a-y]*[a-y]*(?![a-y]|$)")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(slow, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = Tokenizer.from_folder(folder(tmp_path, tokenizer))
    for parse_special in (True, False):
        with pytest.raises(RequestError, match="the text of 200 characters cannot be cut"):
            ours.encode("h" * 200, parse_special=parse_special)
        assert ours.decode(ours.encode("hello", parse_special=parse_special)) == "hello"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": "<nope>"}, "bos_token '<nope>' is not in the vocabulary"),
        ({"eos_token": 3}, "eos_token is int; it must be str"),
        ({"eos_token": {"content": 3}}, r"eos_token\.content is int"),
        ({"chat_template": 3}, "chat_template is int"),
        ({"chat_template": [3]}, r"chat_template\[0\] is not an object with name"),
    ],
)
def test_a_bad_tokenizer_config_is_refused_by_field(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {message}"):
        vocabulary_from_folder(folder(tmp_path, original(), **config))


def test_every_truncation_of_tokenizer_json_is_refused(tmp_path: Path) -> None:
    whole = (folder(tmp_path, original()) / "tokenizer.json").read_bytes()
    for end in range(0, len(whole) - 1, 997):
        (tmp_path / "tokenizer.json").write_bytes(whole[:end])
        with pytest.raises(RooflineError):
            vocabulary_from_folder(tmp_path)


def test_a_template_is_its_own_text_or_in_a_file(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D{{ 1 }}"}]
    files = {
        "own.jinja": "D{{ 1 }}",
        "own.txt": "D{{ 1 }}",
        "chat_template.json": json.dumps({"chat_template": "D{{ 1 }}"}),
        "tokenizer_config.json": json.dumps({"eos_token": "x", "chat_template": named}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for option in ("D{{ 1 }}", *(str(tmp_path / name) for name in files)):
        assert read_chat_template(option).sources["default"] == "D{{ 1 }}"
    assert read_chat_template("D{% if x %}{% endif %}").sources["default"].startswith("D{%")
    assert read_chat_template(str(tmp_path / "tokenizer_config.json")).sources["tools"] == "T"


def test_a_template_that_cannot_be_had_is_refused_with_its_place(tmp_path: Path) -> None:
    broken, none, wrong = tmp_path / "a.jinja", tmp_path / "none.json", tmp_path / "wrong.json"
    broken.write_text("one\n{% if %}")
    none.write_text('{"chat_template": []}')
    wrong.write_text('{"chat_template": 7}')
    (tmp_path / "binary.jinja").write_bytes(b"\xff")
    for option, problem in {
        str(broken): f"{broken}: line 2: ",
        "{% if %}": "chat template: line 1: ",
        str(none): f"{none}: has no chat_template",
        str(wrong): f"{wrong}: chat_template is int; it must be str",
        str(tmp_path / "binary.jinja"): "binary.jinja: is not UTF-8",
        str(tmp_path): f"{tmp_path}: is not a regular file",
        "chatml": "chat_template 'chatml': no such file or folder; give a file, or a template's",
        "x" * 999: "cannot be read: File name too long; give a file",
    }.items():
        with pytest.raises(RooflineError) as caught:
            read_chat_template(option)
        assert problem in caught.value.message
        assert "\n" not in caught.value.message
