"""A small SentencePiece model as Llama 2's was trained, and the files that others make of one."""

import functools
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers.tokenization_utils_base import generate_merges

from tests.llama2c_writer import write_tokenizer

SIZE = 600
UNKNOWN, BOS, EOS = range(3)
_SPACE = "\u2581"
_TEXT = """\
The miller's daughter walked to the river, and the river told her what the mountains had said.
"Where are you going?" asked the heron; she answered that she was going where the water went.
All day long the wheels turned, turning the stones that turned the corn into meal and bread.
There were three brothers: the eldest was strong, the second was clever, the youngest listened.
In winter the windows froze, and the children drew ships, castles and whales with their fingers.
Nobody knows whether the lighthouse keeper ever slept; his lamp was never seen to go out.
x = [i ** 2 for i in range(10)]  # squares, from 0 to 81
    if not name.startswith("_"):
        return {key: value for key, value in items}
The price rose by 12.5 % in 1987, from 1,250 to 1,406 crowns; in 2024 it was 9 times as high.
aaaa aa aaa aaaaaa ababab abcabc bcd abcd --- ===== ....
Der Müller läßt grüßen; der Fluß fließt über die Wiese. Où êtes-vous allés cet été, déjà?
Быстрая река течёт и течёт, и мельница никогда не спит. Мельник спит и не слышит.
川は山から流れ、水車は回り続ける。水車小屋の娘は川の話を聞いた。
"""


@functools.cache
def trained() -> sentencepiece.SentencePieceProcessor:
    """BPE of SIZE pieces with a byte for each character it does not know."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines() * 3),
        model_writer=model,
        vocab_size=SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    """Metadata as llama.cpp's converter writes it; a change to None leaves a key out."""
    model = trained()
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(id) for id in range(SIZE)],
        "scores": np.array([model.get_score(id) for id in range(SIZE)], np.float32),
        "token_type": np.array([_gguf_type(id) for id in range(SIZE)], np.int32),
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "unknown_token_id": UNKNOWN,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    } | changes
    return {
        name if "." in name else f"tokenizer.ggml.{name}": value
        for name, value in metadata.items()
        if value is not None
    }


def write_tokenizer_bin(path: Path) -> Path:
    """tokenizer.bin as llama2.c's tokenizer.py exports it."""
    model = trained()
    texts = [model.id_to_piece(id).replace(_SPACE, " ") for id in range(SIZE)]
    texts[BOS], texts[EOS] = "\n<s>\n", "\n</s>\n"
    scores = [model.get_score(id) for id in range(SIZE)]
    return write_tokenizer(path, zip((text.encode() for text in texts), scores, strict=True))


def write_tokenizer_json(
    folder: Path, style: Literal["prepend", "metaspace"], **config: Any
) -> Path:
    """A folder's tokenizer.json: of Llama 2 (a normalizer prepends) or of today (a Metaspace)."""
    model = trained()
    ids = {model.id_to_piece(id): id for id in range(SIZE)}
    scores = {piece: model.get_score(id) for piece, id in ids.items() if not _is_reserved(id)}
    bpe = models.BPE(
        ids, generate_merges(ids, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made = tokenizers.Tokenizer(bpe)
    if style == "prepend":
        replace = normalizers.Replace(" ", _SPACE)
        made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first", split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    names = ("<unk>", "<s>", "</s>")
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _is_reserved(id: int) -> bool:
    model = trained()
    return model.is_control(id) or model.is_unknown(id) or model.is_byte(id)


def _gguf_type(id: int) -> int:
    model = trained()
    if model.is_unknown(id):
        return 2
    if model.is_control(id):
        return 3
    return 6 if model.is_byte(id) else 1
