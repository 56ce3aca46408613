"""A vocabulary from llama2.c's tokenizer.bin: the pieces and scores of a SentencePiece model.

The file is untrusted. It names no token: the first three are those that `run.c` takes them for.
"""

import math
import os
import struct
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken

from roofline.errors import CheckpointError, UnsupportedError, shown
from roofline.tokenizer.sentencepiece_bpe import (
    BYTE_OF_PIECE,
    SPACE,
    sentencepiece_bpe,
    sentencepiece_bytes,
)
from roofline.tokenizer.vocabulary import Vocabulary

_MAX_FILE_BYTES = 1 << 27
_LENGTH = struct.Struct("<i")  # of the longest piece, at the start
_ENTRY = struct.Struct("<fi")  # a score, and the length of the piece that follows

_SPECIALS = ("<unk>", "<s>", "</s>")
_BOS, _EOS = 1, 2


def vocabulary_from_llama2c(path: str | os.PathLike[str]) -> Vocabulary:
    """Check and build. Both `<s>` and `</s>` end an answer: a story of llama2.c ends in `<s>`."""
    file = Path(path)
    pieces, scores = _read(file)
    pieces[: len(_SPECIALS)] = [piece.strip("\n") for piece in pieces[: len(_SPECIALS)]]
    if tuple(pieces[: len(_SPECIALS)]) != _SPECIALS:
        raise UnsupportedError(
            f"{file}: its first tokens are {shown(pieces[: len(_SPECIALS)])}; "
            f"supported: {', '.join(_SPECIALS)}, those of a SentencePiece model"
        )
    piece, count = Counter(pieces).most_common(1)[0]
    if count > 1:
        raise CheckpointError(f"{file}: holds {shown(piece)} {count} times; once is possible")
    bpe = sentencepiece_bpe(
        pieces,
        scores,
        [id for id in range(len(_SPECIALS), len(pieces)) if pieces[id] not in BYTE_OF_PIECE],
        unknown=_SPECIALS[0],
        leads_with_space=True,
        source=str(file),
    )
    bpe.add_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIALS])
    return Vocabulary(
        source=str(file),
        bpe=bpe,
        size=len(pieces),
        bos_token_id=_BOS,
        eos_token_ids=(_EOS, _BOS),
        prefix=(_BOS,),
        template_tokens={"bos_token": _SPECIALS[_BOS], "eos_token": _SPECIALS[_EOS]},
        piece_bytes=sentencepiece_bytes,
        leads_with_space=True,
    )


def _read(file: Path) -> tuple[list[str], list[float]]:
    """Every piece, its spaces as SentencePiece writes them, and its score."""
    data = _bytes(file)
    if len(data) < _LENGTH.size:
        raise CheckpointError(f"{file}: has {len(data)} bytes; no tokenizer.bin is so short")
    (longest,) = _LENGTH.unpack_from(data)
    pieces, scores = list[str](), list[float]()
    position = _LENGTH.size
    while position < len(data):
        where = f"{file}: token {len(pieces)}"
        if len(data) - position < _ENTRY.size:
            raise CheckpointError(f"{where} is cut short by the end of the file")
        score, length = _ENTRY.unpack_from(data, position)
        position += _ENTRY.size
        if not 1 <= length <= min(longest, len(data) - position):
            raise CheckpointError(
                f"{where} has {length} bytes; the longest has {longest}, "
                f"and the file has {len(data) - position} more"
            )
        if not math.isfinite(score):
            raise CheckpointError(f"{where} has the score {score}; it must be finite")
        try:
            pieces.append(data[position : position + length].decode().replace(" ", SPACE))
        except UnicodeDecodeError:
            raise CheckpointError(f"{where} is not UTF-8") from None
        scores.append(score)
        position += length
    return pieces, scores


def _bytes(file: Path) -> bytes:
    try:
        if not file.is_file():  # opening a FIFO would wait for its writer
            fault = "is not a regular file" if file.exists() else "no such file"
            raise CheckpointError(f"{file}: {fault}")
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{file}: is larger than {_MAX_FILE_BYTES} bytes")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
