"""SentencePiece's BPE by the `tokenizers` library: merges rebuilt from scores, bytes of pieces.

Files that hold such a vocabulary are read elsewhere; none of them holds the merges. What is here is
the model of Llama 2: no normalization, a space before each text, bytes for unknown characters.
"""

from collections.abc import Collection, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

from roofline.errors import CheckpointError
from roofline.tokenizer.vocabulary import refusing_bad_vocabulary

SPACE = "\u2581"  # how a piece writes a space
BYTE_OF_PIECE = {f"<0x{byte:02X}>": byte for byte in range(256)}

_MAX_PIECE_CHARACTERS = 256  # trained ones have 16; every place to cut one is tried


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    text_ids: Collection[int],
    *,
    unknown: str | None,
    leads_with_space: bool,
    source: str,
) -> tokenizers.Tokenizer:
    """Build from pieces, of which those of `text_ids` are made of others by merging.

    `source` is the file's name for messages. A space goes before every stretch of text between
    added tokens, as in llama.cpp and in the tokenizer.json of Llama 2.
    """
    merges = _merges(pieces, scores, text_ids, source)
    ids = {piece: index for index, piece in enumerate(pieces)}
    with refusing_bad_vocabulary(source):
        model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        bpe = tokenizers.Tokenizer(model)
    escape = normalizers.Replace(" ", SPACE)
    prepend = [normalizers.Prepend(SPACE)] if leads_with_space else []
    bpe.normalizer = normalizers.Sequence([*prepend, escape])
    strip = [decoders.Strip(" ", 1, 0)] if leads_with_space else []
    spaces = decoders.Replace(SPACE, " ")
    bpe.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *strip])
    return bpe


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes a piece stands for, with its spaces."""
    byte = BYTE_OF_PIECE.get(piece)
    return piece.replace(SPACE, " ").encode() if byte is None else bytes((byte,))


def _merges(
    pieces: Sequence[str], scores: Sequence[float], text_ids: Collection[int], source: str
) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, those of the best score first.

    SentencePiece merges the pair whose piece scores best, the leftmost of several; the library has
    one rank for a pair instead, which differs where two ways to make the same piece compete.
    """
    texts = {pieces[index] for index in text_ids}
    ranked = sorted(text_ids, key=lambda index: (-scores[index], index))
    merges = list[tuple[str, str]]()
    for index in ranked:
        piece = pieces[index]
        if len(piece) > _MAX_PIECE_CHARACTERS:
            raise CheckpointError(
                f"{source}: token {index} is {len(piece)} characters long; "
                f"at most {_MAX_PIECE_CHARACTERS} are supported"
            )
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in halves if left in texts and right in texts]
    return merges
