"""A small byte-level vocabulary and its ids, and the files that models have such a one in.

It was trained on text that was not cut, so that it cuts nowhere by itself: a rule that does shows
in the ids. How, is in data/make_byte_level_tables.py.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.original_rules import LLAMA3, QWEN2, TEKKEN

_DATA = Path(__file__).parent / "data"
_VOCABULARY: dict[str, Any] = json.loads((_DATA / "byte_level_vocabulary.json").read_text())
TOKENS: list[str] = _VOCABULARY["tokens"]
MERGES: list[str] = _VOCABULARY["merges"]
SPECIALS: list[str] = _VOCABULARY["specials"]
TABLE: list[dict[str, Any]] = json.loads((_DATA / "byte_level_ids.json").read_text())["strings"]


class Steps(NamedTuple):
    """What tells the rules apart in a tokenizer.json."""

    cuts: list[dict[str, Any]]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False


def split_then_bytes(pattern: str) -> list[dict[str, Any]]:
    """As tokenizer.json has it for models whose words a published pattern cuts."""
    regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**regex, "invert": False}, _BYTES | {"use_regex": False}]


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# As in the tokenizer.json of a model of each kind; llama.cpp's default is in none.
STEPS = {
    "gpt-2": Steps([_BYTES]),
    "llama-bpe": Steps(split_then_bytes(LLAMA3), ignore_merges=True),
    "qwen2": Steps(split_then_bytes(QWEN2), {"type": "NFC"}),
    "smollm": Steps([{"type": "Digits", "individual_digits": True}, _BYTES]),
    "tekken": Steps(split_then_bytes(TEKKEN), ignore_merges=True),
}


def gguf_metadata(pre: str) -> dict[str, Any]:
    """Metadata as llama.cpp's converter writes it."""
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": np.array([3 if token in SPECIALS else 1 for token in TOKENS], np.int32),
        "bos_token_id": TOKENS.index(SPECIALS[0]),
        "eos_token_id": TOKENS.index(SPECIALS[1]),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


def write_tokenizer_json(folder: Path, steps: Steps) -> Path:
    """A folder with a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document = {
        "version": "1.0",
        "added_tokens": [
            {"id": TOKENS.index(token), "content": token, "special": True, **flags}
            for token in SPECIALS
        ],
        "normalizer": steps.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps.cuts},
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(TOKENS) if token not in SPECIALS},
            "merges": MERGES,
            "ignore_merges": steps.ignore_merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder
