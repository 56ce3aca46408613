"""What a tokenizer is built from, whichever file it came in; no reading and no encoding here."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import tokenizers

from roofline.errors import CheckpointError

# What special tokens are called in templates and in tokenizer_config.json.
TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes are themselves, the others lie from U+0100 on.

    Source: `bytes_to_unicode` in OpenAI's gpt-2 `encoder.py`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_MAX_REASON = 200  # characters: it may hold a token of the file, of any length

BYTE_OF_CHARACTER = _byte_of_character()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a piece of a byte-level BPE; one not in its alphabet is its own text."""
    try:
        return bytes(map(BYTE_OF_CHARACTER.__getitem__, piece))
    except KeyError:
        return piece.encode()


@dataclass(frozen=True)
class Vocabulary:
    """A BPE and the ids that stand for more than text, checked against each other."""

    source: str  # the file, for messages
    bpe: tokenizers.Tokenizer  # it finds its special tokens in a text
    size: int  # one more than the largest id
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()  # ids the model wants before a text
    suffix: tuple[int, ...] = ()  # and after it
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # by name, such as default
    context_tokens: int | None = None  # of the model, where its files say
    template_tokens: Mapping[str, str] = field(default_factory=dict)  # such as bos_token: '<s>'
    piece_bytes: Callable[[str], bytes] = byte_level_bytes  # what a token that is text stands for
    leads_with_space: bool = False  # decoding takes off the space that encoding puts before a text

    @property
    def kind(self) -> str:
        """What its pieces are made of, in words."""
        byte_level = self.piece_bytes is byte_level_bytes
        return "byte-level BPE" if byte_level else "SentencePiece BPE"


@contextmanager
def refusing_bad_vocabulary(source: str) -> Generator[None, None, None]:
    """Turn whatever the `tokenizers` library says of a bad vocabulary into a CheckpointError.

    It raises bare Exception for most, TypeError for text that is no UTF-8, and a panic in its Rust
    arrives as a BaseException of its own.
    """
    try:
        yield
    except BaseException as error:
        if type(error) in (Exception, TypeError) or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())[:_MAX_REASON]
            raise CheckpointError(f"{source}: is no usable tokenizer: {reason}") from error
        raise
