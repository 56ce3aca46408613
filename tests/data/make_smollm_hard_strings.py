"""Write smollm_hard_strings.json: hard strings and their ids by the original tokenizer's rules.

    python tests/data/make_smollm_hard_strings.py MODEL.gguf > tests/data/smollm_hard_strings.json

The rules are spelt out here once more, in plain Python and with another regex engine, so that the
table owes nothing to Roofline. The vocabulary and merges are read by the `gguf` package; the
`tokenizers` library, with the pre-tokenizer of SmolLM2's own tokenizer.json, must agree.
"""

import json
import sys
from itertools import pairwise

import gguf
import regex
import tokenizers
from tokenizers import models, pre_tokenizers

HOW = (
    "Made by make_smollm_hard_strings.py from the vocabulary and merges of SmolLM2-135M-Instruct: "
    "every numeric character (category N) alone, then GPT-2's word pattern on each stretch between "
    "them, UTF-8 bytes in GPT-2's alphabet, merges by rank; no special tokens. Bytes that have no "
    "token (04 06 13 14 16 1D, C0 C1 F1 F2 F5-FF) are dropped, as in the original. Computed twice, "
    "in plain Python with the `regex` package and by the `tokenizers` library, with equal ids."
)

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# ruff: noqa: RUF001 (letters that look like others are what is hard)
STRINGS = [
    *("", "a", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\t\ta", "\r\n", "\r\n\r\n x"),
    *("a  1", "a 1", "a1", "1a", " 1", "  1", "1  2", "12", "2024-10-31", "3.14159", "1,000,000"),
    *("x=10;", "v2.0.1", "0x1F", "½ ² ①", "٣٤", "Ⅷ", "１２３", "10 000", "1\n2", "a\n\n1"),
    *("Hello world", " Hello  world ", "hello   world", "end.  ", "\n\n  indented\n", "a \n b"),
    *("don't", "DON'T", "we'll they've I'd it's", "'tis", "rock'n'roll", "''''", "d'accord"),
    *("def f(x):\n    return x**2  # 2\n", "\tif (a&&b) {\n\t\treturn;\n\t}"),
    *("a->b::c<d>", "#!/bin"),
    *("naïve café", "nai\u0308ve cafe\u0301", "Straße", "ÅÄÖ", "Привет, мир", "Ελληνικά", "שלום"),
    *("مرحبا بالعالم", "नमस्ते", "สวัสดี", "日本語のテキスト", "中文，标点。"),
    *("한국어", "ひらがなカタカナ"),
    *("😀", "😀😃", "👍🏽", "👨‍👩‍👧‍👦", "🇫🇷🇩🇪", "❤️", "1️⃣", "a😀b", " 😀", "é😀 é"),
    *("\u00a0", "a\u00a0b", "\u2003x", "\u200b", "a\u200db", "\ufeffx", "\u3000全角", "\u2028"),
    *("\x00", "a\x00b", "\x04", "a\x04b", "\x1b[0m", "\x7f", "\x85", "\ufffd", "\U000e0041"),
    *("\U00040000", "𝒳𝔘", "ﬁ ﬂ", "Ǆ", "İi", "ſ", "e\u0301\u0302\u0303", "\u202eabc\u202c"),
    *("...", "---", "***", "!!!???", "$%^&*()", "http://a.b/c?d=e&f=1", "me@x.org", "C:\\dir\\1"),
    *("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<repo_name>", "< |im_end| >"),
    *("<|im_end", "|>", "<|", "<<|im_end|>>", "<file_sep>1</file_sep>", "[INST] <<SYS>>"),
    *("Ġ", "Ġthe", "Ċ", "▁the", "â", "ĠĠ1", "thethethe", "xxxxxxxxxxxxxxxxxxxxxxxx", "=" * 40),
    *(" " * 17, " " * 100 + "x", "\n" * 9, "0" * 12, "a" * 65, "ab" * 33),
    "A man, a plan: 7 canals.",
]


def main() -> None:
    """Print the table for the GGUF file named on the command line."""
    fields = gguf.GGUFReader(sys.argv[1]).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    library = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    table = []
    for text in STRINGS:
        pieces = [piece for word in words(text) for piece in merged(word, ranks) if piece in ids]
        found = [ids[piece] for piece in pieces]
        if found != library.encode(text).ids:
            raise SystemExit(f"the two disagree on {text!r}")
        table.append({"text": text, "ids": found, "tokens": pieces})
    lines = ",\n".join(json.dumps(entry) for entry in table)
    print(f'{{"how": {json.dumps(HOW)},\n"strings": [\n{lines}\n]}}')


def words(text: str) -> list[str]:
    """Cut a text into words, in GPT-2's alphabet of bytes."""
    stretches = regex.findall(r"\p{N}|[^\p{N}]+", text)
    cut = [word for stretch in stretches for word in WORDS.findall(stretch)]
    return ["".join(character(byte) for byte in word.encode()) for word in cut]


def character(byte: int) -> str:
    """Return a byte's character in GPT-2's alphabet: itself if printable, else one above U+0100."""
    if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
        return chr(byte)
    rank = byte if byte <= 0x20 else 0x43 if byte == 0xAD else byte - 0x7F + 0x21
    return chr(0x100 + rank)


def merged(word: str, ranks: dict[tuple[str, ...], int]) -> list[str]:
    """Merge the pair of lowest rank, leftmost first, until none is left."""
    pieces = list(word)
    while True:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(pieces))]
        rank, at = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return pieces
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


if __name__ == "__main__":
    main()
