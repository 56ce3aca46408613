"""What is accepted from tokenizer.bin; what its ids are is in `sentencepiece_bpe_test`."""

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.errors import RooflineError, UnsupportedError
from roofline.tokenizer.llama2c_vocabulary import vocabulary_from_llama2c
from tests.llama2c_writer import write_tokenizer
from tests.sentencepiece_model import BOS, EOS, SIZE, write_tokenizer_bin

SPECIALS = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
LETTERS = [(b"a", -1.0), (b" ", -2.0)]


def refusal(file: Path) -> RooflineError:
    with pytest.raises(RooflineError) as caught:
        vocabulary_from_llama2c(file)
    assert caught.value.message.startswith(f"{file}: ")
    assert "\n" not in caught.value.message
    return caught.value


def test_tokens_are_what_llama2c_takes_them_for(tmp_path: Path) -> None:
    vocabulary = vocabulary_from_llama2c(write_tokenizer_bin(tmp_path / "tokenizer.bin"))
    assert vocabulary.size == SIZE
    assert (vocabulary.bos_token_id, vocabulary.eos_token_ids) == (BOS, (EOS, BOS))
    assert (vocabulary.prefix, vocabulary.suffix) == ((BOS,), ())
    assert vocabulary.template_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert not vocabulary.chat_templates


def test_every_truncation_is_refused_or_ends_between_two_tokens(tmp_path: Path) -> None:
    whole = write_tokenizer(tmp_path / "whole.bin", SPECIALS + LETTERS).read_bytes()
    ends = {len(whole) - 9, len(whole)}
    for end in range(len(whole) + 1):
        file = tmp_path / "tokenizer.bin"
        file.write_bytes(whole[:end])
        if end in ends or end == len(whole) - 18:
            assert vocabulary_from_llama2c(file).size >= len(SPECIALS)
        else:
            refusal(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"abc", "has 3 bytes"),
        (struct.pack("<i", 9), "its first tokens are []; supported: <unk>, <s>, </s>"),
        (struct.pack("<ifi", 9, 0, 10) + b"x" * 10, "token 0 has 10 bytes; the longest has 9"),
        (struct.pack("<ifi", 9, 0, 0), "token 0 has 0 bytes"),
        (struct.pack("<ifi", 9, 0, -1), "token 0 has -1 bytes"),
        (struct.pack("<ifi", -1, 0, 1) + b"x", "the longest has -1"),
        (struct.pack("<ifi", 2**31 - 1, 0, 2**31 - 1) + b"x", "and the file has 1 more"),
        (struct.pack("<if", 9, 0), "token 0 is cut short by the end of the file"),
        (struct.pack("<ifi", 9, float("nan"), 1) + b"x", "token 0 has the score nan"),
        (struct.pack("<ifi", 9, float("inf"), 1) + b"x", "token 0 has the score inf"),
        (struct.pack("<ifi", 9, 0, 2) + b"\xc3\x28", "token 0 is not UTF-8"),
    ],
    ids=range(12),
)
def test_a_file_that_lies_is_refused_by_token(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "tokenizer.bin"
    file.write_bytes(content)
    assert message in refusal(file).message


def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.bin", [(b"!", 0.0), (b'"', 0.0), (b"#", 0.0)])
    error = refusal(file)
    assert isinstance(error, UnsupportedError)
    assert "its first tokens are ['!', '\"', '#']; supported: <unk>, <s>, </s>" in error.message


def test_a_piece_that_comes_twice_is_refused(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.bin", [*SPECIALS, *LETTERS, *LETTERS])
    assert "holds 'a' 2 times" in refusal(file).message


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.bin").message
    assert "is not a regular file" in refusal(tmp_path).message
    os.mkfifo(tmp_path / "fifo.bin")
    assert "is not a regular file" in refusal(tmp_path / "fifo.bin").message
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(1 << 40)
    assert "is larger than" in refusal(tmp_path / "huge.bin").message


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_taken_or_refused_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, well_begun: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.bin"
    start = write_tokenizer(file, SPECIALS).read_bytes() if well_begun else b""
    file.write_bytes(start + data)
    try:
        vocabulary_from_llama2c(file)
    except RooflineError as error:
        assert error.message.startswith(f"{file}: ")
