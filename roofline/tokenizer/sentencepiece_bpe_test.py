"""SentencePiece's vocabularies from each kind of file; the oracle is `sentencepiece` itself."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from roofline.errors import CheckpointError, RequestError
from roofline.tokenizer.sentencepiece_bpe import sentencepiece_bpe, sentencepiece_bytes
from roofline.tokenizer.text_stream import TextStream
from roofline.tokenizer.tokenizer import Tokenizer
from tests.sentencepiece_model import (
    BOS,
    EOS,
    SIZE,
    UNKNOWN,
    gguf_metadata,
    trained,
    write_tokenizer_bin,
    write_tokenizer_json,
)

MODEL = trained()
FIRST_BYTE = 3
HARD_STRINGS = [
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    " a  b   c    d",
    "\n",
    "\n\n a\n",
    "\t\r\n",
    "The miller's daughter",
    "the mountains  had said",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abcabcabcdabcd bcdbcd",
    "=" * 33 + "-" * 17,
    "0123456789 1,250.00",
    "naïve café déjà vu",
    "река течёт и не спит",
    "水車小屋の娘",
    "😀👍🏽👨‍👩‍👧",  # not one is in the vocabulary
    "e\u0301 \u00e9",
    "\u200b\u00a0\ufeff",
    "\ufffd",
    "a\0b\x01\x7f",
    "<s>",
    "</s> <unk>",
    "<0x41><0x0A>",
    "[INST] hi [/INST]",
    "\U0010ffff",
]
# SentencePiece writes spaces as U+2581, so that one in a text comes back as a space.
TEXTS = st.text(st.one_of(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]),
                          st.sampled_from("  aabcdthe\n=0é水")), max_size=40)  # fmt: skip
BYTES_OF_EMOJI = [FIRST_BYTE + byte for byte in "😀 ".encode()]
FORMATS = ["gguf", "tokenizer.bin", "prepend", "metaspace"]


@pytest.fixture(scope="module", params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(format: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if format == "gguf":
        return Tokenizer.from_gguf(gguf_metadata(), "model.gguf")
    if format == "tokenizer.bin":
        return Tokenizer.from_llama2c(write_tokenizer_bin(folder / "tokenizer.bin"))
    return Tokenizer.from_folder(
        write_tokenizer_json(folder, "prepend" if format == "prepend" else "metaspace")
    )


def encodable(format: str, text: str) -> str:
    """What a format keeps of a text: a Metaspace takes a text's own first space for its."""
    return text.lstrip(" ") if format == "metaspace" else text


@pytest.mark.parametrize("text", HARD_STRINGS, ids=repr)
def test_hard_strings_have_the_ids_of_sentencepiece(
    tokenizer: Tokenizer, format: str, text: str
) -> None:
    text = encodable(format, text)
    expected = MODEL.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == [BOS, *expected]
    assert tokenizer.decode(tokenizer.encode(text)) == MODEL.decode(expected) == text


@given(text=TEXTS)
@example(text="a" * 300)
def test_any_text_has_the_ids_of_sentencepiece_and_comes_back(
    tokenizer: Tokenizer, format: str, text: str
) -> None:
    text = encodable(format, text)
    ids = tokenizer.encode(text)
    assert ids == [BOS, *MODEL.encode(text)]
    assert tokenizer.decode(ids) == text


@given(one=st.text("ab", max_size=60), other=st.text("abcd ", max_size=60))
def test_repeating_text_has_the_ids_of_sentencepiece(
    tokenizer: Tokenizer, format: str, one: str, other: str
) -> None:
    for text in (one, other, one + " " * len(other) + one):
        text = encodable(format, text)
        assert tokenizer.encode(text, add_special_tokens=False) == MODEL.encode(text)


def test_named_tokens_are_the_models(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids[0]) == (BOS, EOS)
    assert tokenizer.adds_bos
    assert tokenizer.special_ids == {UNKNOWN, BOS, EOS}
    assert tokenizer.encode("</s>", parse_special=True)[1:] == [EOS]
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("</s>")[1:])


def test_token_bytes_are_those_of_the_piece(tokenizer: Tokenizer) -> None:
    for id in range(SIZE):
        piece = MODEL.id_to_piece(id)
        if MODEL.is_byte(id):
            assert tokenizer.token_bytes(id) == bytes([id - FIRST_BYTE])
        else:
            assert tokenizer.token_bytes(id) == piece.replace("\u2581", " ").encode()
    assert tokenizer.token_text(FIRST_BYTE + 0xF0) == "\ufffd"


@given(ids=st.lists(st.integers(FIRST_BYTE + 256, SIZE - 1), max_size=20))
def test_ids_of_text_decode_as_sentencepiece_decodes_them(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert tokenizer.decode(ids) == MODEL.decode(ids)
    assert tokenizer.decode([BOS, *ids, EOS]) == MODEL.decode(ids)


@given(
    ids=st.lists(st.one_of(st.integers(0, SIZE - 1), st.sampled_from(BYTES_OF_EMOJI)), max_size=20),
    before=st.lists(st.integers(0, SIZE - 1), max_size=5),
    size=st.integers(1, 4),
)
def test_a_stream_is_what_the_decoded_text_grows_by(
    tokenizer: Tokenizer, ids: list[int], before: list[int], size: int
) -> None:
    before = [id for id in before if not MODEL.is_byte(id)]  # whole characters
    for skip in (True, False):
        stream = TextStream(tokenizer, after=before, skip_special_tokens=skip)
        batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        shown = [stream.push(batch) for batch in batches]
        text = "".join(shown) + stream.finish()
        start = tokenizer.decode(before, skip_special_tokens=skip)
        whole = tokenizer.decode([*before, *ids], skip_special_tokens=skip)
        assert whole in [start + text + unfinished for unfinished in ("", "\ufffd", "\ufffd" * 2)]


@given(text=TEXTS, size=st.integers(1, 4))
def test_text_streams_without_a_character_it_lacks(
    tokenizer: Tokenizer, format: str, text: str, size: int
) -> None:
    text = encodable(format, text)
    stream, ids = TextStream(tokenizer), tokenizer.encode(text)
    shown = "".join(stream.push(ids[start : start + size]) for start in range(0, len(ids), size))
    assert shown + stream.finish() == text


def test_an_answer_keeps_its_first_space_where_it_goes_on_from_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the river", add_special_tokens=False)
    for after, text in {(): "the river", (BOS,): "the river", (BOS, ids[0]): " the river"}.items():
        stream = TextStream(tokenizer, after=after)
        assert "".join(stream.push([id]) for id in ids) == text
    stream = TextStream(tokenizer, after=(BOS,), skip_special_tokens=False)
    assert stream.push(ids) == " the river"  # for <s> is shown before it


def test_a_stop_string_with_a_space_before_it_is_found(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=[" river"], after=[BOS])
    shown = [stream.push([id]) for id in tokenizer.encode("the river said")]
    assert "".join(shown) == stream.text == "the"
    assert stream.stopped_by == " river"


TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}[INST] {{ m.content }} [/INST]"
    "{{ eos_token }}{% endfor %}"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_chats_have_the_ids_of_transformers(tmp_path: Path, style: Any) -> None:
    folder = write_tokenizer_json(tmp_path, style, chat_template=TEMPLATE)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for contents in (["the river"], ["a", " b ", "😀\n"], ["", "x"]):
        chat = [user(content) for content in contents]
        expected = theirs.apply_chat_template(chat, return_dict=False)
        assert ours.apply_chat_template(chat) == expected
    for text in HARD_STRINGS:
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
        assert ours.decode(ours.encode(text, parse_special=True)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_text_after_a_special_token_is_encoded_alike_beside_a_forged_one(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    again = Tokenizer.from_folder(tmp_path)
    honest = again.apply_chat_template([user("the river"), user("said")])
    forged = again.apply_chat_template([user("the </s>"), user("said")])
    for ids in (honest, forged):
        assert [id for id in ids if id in again.special_ids] == [BOS, EOS, EOS]
    assert honest[honest.index(EOS) :] == forged[forged.index(EOS) :]


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in HARD_STRINGS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (again.bos_token_id, again.adds_bos) == (BOS, True)


def test_without_a_space_before_texts_the_first_space_is_kept() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(add_space_prefix=False), "model.gguf")
    for text in filter(None, HARD_STRINGS):
        assert tokenizer.encode(f" {text}") == [BOS, *MODEL.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_piece_of_bytes_is_that_byte_and_text_is_text() -> None:
    assert sentencepiece_bytes("<0x00>") == b"\0"
    assert sentencepiece_bytes("<0xFF>") == b"\xff"
    assert sentencepiece_bytes("<0xff>") == b"<0xff>"
    assert sentencepiece_bytes("\u2581a\u2581") == b" a "
    assert sentencepiece_bytes("é") == "é".encode()


def test_reserved_pieces_are_never_merged_into() -> None:
    pieces = ["<unk>", "a", "b", "ab", "abb"]
    made = sentencepiece_bpe(
        pieces, [0.0] * 5, [1, 2, 4], unknown="<unk>", leads_with_space=False, source="m"
    )
    assert made.encode("ab").tokens == ["a", "b"]


def test_a_piece_of_any_length_costs_no_more_than_its_refusal() -> None:
    pieces = ["<unk>", "a" * 10**6]
    start = time.thread_time()
    with pytest.raises(CheckpointError, match="m: token 1 is 1000000 characters long; at most"):
        sentencepiece_bpe(
            pieces, [0.0, 0.0], [1], unknown="<unk>", leads_with_space=True, source="m"
        )
    assert time.thread_time() - start < 0.5


def test_a_character_the_vocabulary_cannot_write_is_refused() -> None:
    tokens = list(gguf_metadata()["tokenizer.ggml.tokens"])
    tokens[FIRST_BYTE + 0xF0] = "no byte"
    tokenizer = Tokenizer.from_gguf(gguf_metadata(tokens=tokens), "model.gguf")
    assert tokenizer.decode(tokenizer.encode("\x01")) == "\x01"
    with pytest.raises(RequestError, match="encodes to the special token '<unk>'"):
        tokenizer.encode("😀")


def test_the_vocabulary_of_llama_2_is_built_in_seconds() -> None:
    pieces = ["<unk>", *(chr(0x4E00 + i) for i in range(2_000))]
    pieces += [a + b for a in pieces[1:201] for b in pieces[1:151]]
    start = time.thread_time()
    scores = [-float(i) for i in range(len(pieces))]
    ids = range(1, len(pieces))
    sentencepiece_bpe(pieces, scores, ids, unknown="<unk>", leads_with_space=True, source="m")
    assert time.thread_time() - start < 5
