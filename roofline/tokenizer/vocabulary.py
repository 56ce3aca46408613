"""What a tokenizer is built from, whichever file it came in. No encoding and no reading of files here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import tokenizers

from roofline.errors import CheckpointError


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE and the ids that stand for more than text, checked against each other."""

    source: str  # the file, for messages
    bpe: tokenizers.Tokenizer  # its special tokens are added to it; it adds none to a text itself
    size: int  # one more than the largest id
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()  # ids the model wants before a text
    suffix: tuple[int, ...] = ()  # and after it
    chat_template: str | None = None
    template_tokens: Mapping[str, str] = field(default_factory=dict)  # such as bos_token: '<s>'


@contextmanager
def refusing_bad_vocabulary(source: str) -> Iterator[None]:
    """Turn whatever the `tokenizers` library says of a bad vocabulary into a CheckpointError.

    It raises bare Exception for most, and a Rust panic arrives as a BaseException of its own.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{source}: not a usable tokenizer: {reason}") from error
        raise
