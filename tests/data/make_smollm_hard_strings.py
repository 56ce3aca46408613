"""Write smollm_hard_strings.json: hard strings and their ids by the original tokenizer's rules.

    python -m tests.data.make_smollm_hard_strings MODEL.gguf > tests/data/smollm_hard_strings.json

The vocabulary and merges are read by the `gguf` package; the `tokenizers` library, with the
pre-tokenizer of SmolLM2's own tokenizer.json, must agree with the original rule.
"""

import json
import sys

import gguf
import tokenizers
from tokenizers import models, pre_tokenizers

from tests.hard_strings import HARD_STRINGS
from tests.original_rules import RULES, by_pair, bytes_of, printable

HOW = (
    "Made by make_smollm_hard_strings.py from the vocabulary and merges of SmolLM2-135M-Instruct: "
    "every numeric character (category N) alone, then GPT-2's word pattern on each stretch between "
    "them, UTF-8 bytes in GPT-2's alphabet, merges by rank; no special tokens. Bytes that have no "
    "token (04 06 13 14 16 1D, C0 C1 F1 F2 F5-FF) are dropped, as in the original. Computed twice, "
    "in plain Python with the `regex` package and by the `tokenizers` library, with equal ids."
)


def main() -> None:
    """Print the table for the GGUF file named on the command line."""
    fields = gguf.GGUFReader(sys.argv[1]).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    rank = by_pair([(bytes_of(left), bytes_of(right)) for left, right in pairs])
    library = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    table = []
    for text in HARD_STRINGS:
        cut = [printable(piece) for piece in RULES["smollm"].pieces(text, {}, rank)]
        pieces = [piece for piece in cut if piece in ids]
        found = [ids[piece] for piece in pieces]
        if found != library.encode(text).ids:
            raise SystemExit(f"the two disagree on {text!r}")
        table.append({"text": text, "ids": found, "tokens": pieces})
    lines = ",\n".join(json.dumps(entry) for entry in table)
    print(f'{{"how": {json.dumps(HOW)},\n"strings": [\n{lines}\n]}}')


if __name__ == "__main__":
    main()
