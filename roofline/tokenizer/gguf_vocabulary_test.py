"""Tests of what is accepted from GGUF metadata, and of how the rest is refused."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.gguf import GGUFFile
from roofline.tokenizer.gguf_vocabulary import vocabulary_from_gguf
from roofline.tokenizer.tokenizer import Tokenizer
from roofline.tokenizer.vocabulary_test import (
    CHATML,
    ENDOFTEXT,
    IM_END,
    IM_START,
    SIZE,
    small_metadata,
)
from tests.sentencepiece_model import gguf_metadata, trained

TOKENS = small_metadata()["tokenizer.ggml.tokens"]
TYPES = small_metadata()["tokenizer.ggml.token_type"]


def test_size_and_named_tokens_are_the_files() -> None:
    vocabulary = vocabulary_from_gguf(small_metadata(eot_token_id=ENDOFTEXT), "model.gguf")
    assert vocabulary.size == SIZE
    assert vocabulary.bos_token_id == IM_START
    assert vocabulary.eos_token_ids == (IM_END, ENDOFTEXT)
    assert vocabulary.template_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert (vocabulary.prefix, vocabulary.suffix) == ((), ())


def test_bos_and_eos_go_around_a_text_where_the_file_says_so() -> None:
    vocabulary = vocabulary_from_gguf(
        small_metadata(add_bos_token=True, add_eos_token=True), "model.gguf"
    )
    assert (vocabulary.prefix, vocabulary.suffix) == ((IM_START,), (IM_END,))


def test_llama_3_has_a_bos_though_the_file_does_not_say() -> None:
    metadata = small_metadata(pre="llama-bpe", add_bos_token=None)
    assert vocabulary_from_gguf(metadata, "model.gguf").prefix == (IM_START,)
    metadata = small_metadata(pre="qwen2", add_bos_token=None)
    assert vocabulary_from_gguf(metadata, "model.gguf").prefix == ()


def test_llama_3_takes_a_whole_word_of_the_vocabulary_without_merging() -> None:
    tokens = ["hey", *TOKENS]  # no merges lead to it
    types = np.array([1, *TYPES], np.int32)
    whole, merged = (
        vocabulary_from_gguf(small_metadata(pre=pre, tokens=tokens, token_type=types), "m").bpe
        for pre in ("llama-bpe", "qwen2")
    )
    assert whole.encode("hey", add_special_tokens=False).tokens == ["hey"]
    assert merged.encode("hey", add_special_tokens=False).tokens == ["he", "y"]


def test_an_end_token_is_special_whatever_type_it_has() -> None:
    types = TYPES.copy()
    types[IM_END] = 1
    bpe = vocabulary_from_gguf(small_metadata(token_type=types), "model.gguf").bpe
    assert bpe.get_added_tokens_decoder()[IM_END].special


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokens": []}, r"tokens is empty"),
        ({"tokens": "abc"}, r"tokens is str; it must be list"),
        ({"tokens": [*TOKENS[:-1], 7]}, rf"tokens\[{SIZE - 1}\] is int; it must be str"),
        ({"tokens": [*TOKENS[:-1], "a"]}, r"tokens holds 'a' 2 times"),
        ({"tokens": [*TOKENS[:-1], "\ud800"]}, r"is no usable tokenizer"),
        ({"merges": None}, r"merges is missing"),
        ({"merges": ["h e", "h 漢"]}, r"merges\[1\] 'h 漢' names '漢', which is not in"),
        ({"merges": ["z q"]}, r"merges\[0\] 'z q' names 'zq'"),
        ({"merges": ["he"]}, r"merges\[0\] 'he' names ''"),
        ({"merges": ["h e l"]}, r"merges\[0\] 'h e l' names 'e l'"),
        ({"merges": ["h " + "x" * 10**6]}, r"merges\[0\]"),
        ({"token_type": None}, r"token_type is missing"),
        (
            {"token_type": TYPES[:-1]},
            rf"token_type has shape \({SIZE - 1},\) int32; it needs {SIZE}",
        ),
        ({"token_type": TYPES.astype(np.float32)}, r"token_type has shape .* float32"),
        ({"token_type": TYPES.reshape(1, -1)}, r"token_type has shape \(1, "),
        ({"token_type": TYPES * 3}, rf"token_type\[{IM_START}\] is 9; it must be from 1 to 6"),
        ({"bos_token_id": SIZE}, rf"bos_token_id is {SIZE}, outside the vocabulary of {SIZE}"),
        ({"eos_token_id": -1}, r"eos_token_id is -1, outside"),
        ({"eot_token_id": 2**32 - 1}, r"eot_token_id is 4294967295, outside"),
        ({"eos_token_id": True}, r"eos_token_id is bool; it must be int"),
        ({"bos_token_id": None, "add_bos_token": True}, r"bos_token_id is missing, yet every text"),
        ({"add_bos_token": 1}, r"add_bos_token is int; it must be bool"),
        ({"model": None}, r"tokenizer\.ggml\.model is missing"),
        ({"pre": None}, r"tokenizer\.ggml\.pre is missing"),
        ({"tokenizer.chat_template": 3}, r"tokenizer\.chat_template is int; it must be str"),
        ({"tokenizer.chat_templates": ["rag"]}, r"tokenizer\.chat_template\.rag is missing"),
        ({"tokenizer.chat_templates": [1]}, r"tokenizer\.chat_templates\[0\] is int; it must be"),
    ],
)
def test_bad_metadata_is_refused_by_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^model\.gguf: .*{message}") as error:
        vocabulary_from_gguf(small_metadata(**changes), "model.gguf")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"model 'bert' is not supported; supported: gpt2 .*, llama"),
        ({"pre": "falcon"}, r"pre 'falcon' is not supported; supported: deepseek-r1-qwen, default"),
        ({"add_space_prefix": True}, r"add_space_prefix true is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"^model\.gguf: .*{message}"):
        vocabulary_from_gguf(small_metadata(**changes), "model.gguf")


def test_sentencepiece_needs_no_more_than_pieces_types_and_scores() -> None:
    names = ("bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token", "pre")
    left_out = dict.fromkeys((*names, "add_eos_token", "add_space_prefix"))
    vocabulary = vocabulary_from_gguf(gguf_metadata(**left_out), "model.gguf")
    assert vocabulary.bpe.encode("the river").ids == trained().encode("the river")
    assert (vocabulary.bos_token_id, vocabulary.eos_token_ids) == (1, (2,))
    assert (vocabulary.prefix, vocabulary.suffix) == ((1,), ())
    assert vocabulary.leads_with_space
    assert vocabulary.template_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }


def test_sentencepiece_follows_what_the_file_says() -> None:
    metadata = gguf_metadata(add_bos_token=False, add_eos_token=True, eot_token_id=300)
    vocabulary = vocabulary_from_gguf(metadata, "model.gguf")
    assert (vocabulary.prefix, vocabulary.suffix) == ((), (2,))
    assert vocabulary.eos_token_ids == (2, 300)
    assert vocabulary.bpe.get_added_tokens_decoder()[300].special


def test_tokens_a_converter_pads_with_are_never_made_of_text() -> None:
    metadata = gguf_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    changes = {
        "tokens": [*tokens, "the r", "<tool>"],
        "token_type": np.append(types, [5, 4]).astype(np.int32),  # unused, user-defined
        "scores": np.append(metadata["tokenizer.ggml.scores"], [9, 0]).astype(np.float32),
    }
    tokenizer = Tokenizer.from_gguf(gguf_metadata(**changes), "model.gguf")
    assert tokenizer.encode("the r")[1:] == trained().encode("the r")
    assert tokenizer.encode("a<tool>")[-1] == len(tokens) + 1
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool> b"  # as in llama.cpp


SCORES = gguf_metadata()["tokenizer.ggml.scores"]
PIECES = gguf_metadata()["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": [0.5] * 600}, r"scores is list; it must be ndarray"),
        ({"scores": SCORES[:-1]}, r"scores has shape \(599,\) float32; it needs 600 floats"),
        ({"scores": SCORES.astype(np.int8)}, r"scores has shape \(600,\) int8"),
        ({"scores": SCORES.reshape(1, -1)}, r"scores has shape \(1, 600\)"),
        ({"scores": np.append(SCORES[:-1], np.nan)}, r"scores\[599\] is nan; it must be finite"),
        ({"tokens": [*PIECES[:-1], "x" * 300]}, r"token 599 is 300 characters long; at most 256"),
        ({"tokens": [*PIECES[:-1], "\ud800"]}, r"is no usable tokenizer"),
        ({"token_type": None}, r"token_type is missing"),
        ({"bos_token_id": 600}, r"bos_token_id is 600, outside the vocabulary of 600"),
        ({"add_space_prefix": 1}, r"add_space_prefix is int; it must be bool"),
        ({"remove_extra_whitespaces": True}, r"remove_extra_whitespaces true is not supported"),
        ({"precompiled_charsmap": np.ones(4, np.uint8)}, r"precompiled_charsmap is not supported"),
    ],
)
def test_bad_sentencepiece_metadata_is_refused_by_file_and_key(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RooflineError, match=rf"^model\.gguf: .*{message}") as error:
        vocabulary_from_gguf(gguf_metadata(**changes), "model.gguf")
    assert "\n" not in error.value.message


@given(
    st.booleans(),
    st.sampled_from(sorted(small_metadata().keys() | gguf_metadata().keys())),
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
        st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=3),
        st.lists(st.integers(-9, 9), max_size=3).map(lambda values: np.array(values, np.int64)),
        st.lists(st.sampled_from(["h e", " h", "h ", " ", "", "e h", "Ġ Ġ"]), max_size=5),
    ),
)
def test_any_value_of_any_key_is_taken_or_refused_never_a_crash(
    sentencepiece: bool, key: str, value: object
) -> None:
    good = gguf_metadata() if sentencepiece else small_metadata()
    try:
        vocabulary_from_gguf(good | {key: value}, "model.gguf")
    except RooflineError as error:
        assert error.message.startswith("model.gguf: ")


def test_the_real_vocabulary_is_built_in_two_seconds(smollm2_path: Path) -> None:
    with GGUFFile(smollm2_path) as file:
        metadata = file.metadata
    start = time.thread_time()
    vocabulary = vocabulary_from_gguf(metadata, smollm2_path.name)
    assert time.thread_time() - start < 2
    assert vocabulary.size == 49_152
    assert vocabulary.eos_token_ids == (2,)


def test_templates_for_a_purpose_and_the_context_are_read_beside_the_default() -> None:
    changes = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "T"}
    context = {"general.architecture": "llama", "llama.context_length": 512}
    vocabulary = vocabulary_from_gguf(small_metadata(**changes, **context), "model.gguf")
    assert vocabulary.chat_templates == {"default": CHATML, "tool_use": "T"}
    assert vocabulary.context_tokens == 512
    assert vocabulary_from_gguf(small_metadata(), "model.gguf").context_tokens is None
