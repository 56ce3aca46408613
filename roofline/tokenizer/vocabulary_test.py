"""Tests of the byte-level alphabet, and the small vocabulary that this folder's tests share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from roofline.errors import CheckpointError
from roofline.tokenizer.vocabulary import BYTE_OF_CHARACTER, refusing_bad_vocabulary

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "Ċ Ċ", "o r", "< |", "| >", "Ã ©"]
_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
SIZE = 256 + len(_MERGES) + len(_SPECIALS) + 1
IM_START, IM_END, ENDOFTEXT, TOOL = range(SIZE - 4, SIZE)


def small_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a small tokenizer: ids 0-255 are the bytes; a change to None leaves out."""
    bytes_in_order = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
    tokens = [*bytes_in_order, *(merge.replace(" ", "") for merge in _MERGES)]
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*tokens, *_SPECIALS, "<tool>"],
        "merges": _MERGES,
        "token_type": np.array([1] * len(tokens) + [3] * len(_SPECIALS) + [4], np.int32),
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    } | changes
    return {
        name if "." in name else f"tokenizer.ggml.{name}": value
        for name, value in metadata.items()
        if value is not None
    }


def test_every_byte_has_one_character() -> None:
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))
    assert set(BYTE_OF_CHARACTER) == set(pre_tokenizers.ByteLevel.alphabet())


@given(st.text())
def test_the_alphabet_is_the_librarys(text: str) -> None:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    data = bytes(BYTE_OF_CHARACTER[character] for word, _ in words for character in word)
    assert data == text.encode()


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.BPE(vocab={"a": 0, "b": 1}, merges=[("a", "c")]),  # raises bare Exception
        lambda: models.BPE(vocab={"\ud800": 0}, merges=[]),  # TypeError
        lambda: models.BPE(  # panics
            vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], continuing_subword_prefix="#####"
        ),
    ],
)
def test_whatever_the_library_raises_is_a_checkpoint_error_in_one_line(
    build: Callable[[], object],
) -> None:
    expected = pytest.raises(CheckpointError, match=r"^model\.gguf: is no usable tokenizer: \S")
    with expected as error, refusing_bad_vocabulary("model.gguf"):
        build()
    assert "\n" not in error.value.message


def test_an_interrupt_is_not_taken_for_a_bad_vocabulary() -> None:
    with pytest.raises(KeyboardInterrupt), refusing_bad_vocabulary("model.gguf"):
        raise KeyboardInterrupt
