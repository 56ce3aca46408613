"""Write byte_level_vocabulary.json and byte_level_ids.json: what each original rule makes of text.

    python -m tests.data.make_byte_level_tables

The vocabulary is trained here on text that is not cut at all, so that its tokens reach over every
place where a rule may cut, and a rule that cuts elsewhere gives other ids. Some tokens are no merge
of others: they tell the rules that look words up whole. Merging by pair and by token must agree.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tests.hard_strings import HARD_STRINGS
from tests.original_rules import RULES, by_pair, by_token, merges_of, printable

FOLDER = Path(__file__).parent
N_MERGED = 700
LONGEST = 12  # bytes of a trained token
WHOLE_WORDS = ["Ελληνικά", "camelCaseWord", "ひらがなカタカナ"]  # longer, so never trained
ACROSS = [
    "Sa",
    "Ti",
    "Li",
    "Mo",
    "Ea",
    "Ey",
    "Dx",
] * 9  # so that letters join over the end of 'S, 'T, 'LL
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
HOW = "Made by make_byte_level_tables.py with the original rules in tests/original_rules.py."


def main() -> None:
    """Train, encode with every rule, write."""
    texts = [text for text in HARD_STRINGS if not any(map(text.__contains__, SPECIALS))]
    trained = {token: id for id, token in enumerate(train([*texts, *ACROSS]))}
    vocabulary = trained | {
        word.encode(): len(trained) + index for index, word in enumerate(WHOLE_WORDS)
    }
    merges = merges_of(trained)
    tokens = [*map(printable, vocabulary), *SPECIALS]
    written: dict[str, object] = {
        "how": HOW,
        "tokens": tokens,
        "specials": SPECIALS,
        "merges": [f"{printable(left)} {printable(right)}" for left, right in merges],
    }
    write("byte_level_vocabulary.json", written)
    table = list[dict[str, object]]()
    for text in HARD_STRINGS:
        ids = dict[str, list[int]]()
        for name, rule in RULES.items():
            pieces = rule.pieces(text, vocabulary, by_pair(merges))
            if pieces != rule.pieces(text, vocabulary, by_token(trained)):
                raise SystemExit(f"{name}: merging by pair and by token disagree on {text!r}")
            ids[name] = [vocabulary[piece] for piece in pieces]
        table.append({"text": text, "ids": ids})
    write("byte_level_ids.json", {"how": HOW, "strings": table})


def train(texts: Sequence[str]) -> list[bytes]:
    """Byte-pair encoding: the 256 bytes, then again and again the commonest pair as a token."""
    tokens = [bytes((byte,)) for byte in range(256)]
    sequences = [[bytes((byte,)) for byte in text.encode()] for text in texts]
    while len(tokens) < 256 + N_MERGED:
        pairs = (pair for sequence in sequences for pair in pairwise(sequence))
        counts = Counter(pair for pair in pairs if len(b"".join(pair)) <= LONGEST)
        (left, right), _ = max(counts.items(), key=lambda item: (item[1], item[0]))
        if left + right not in tokens:
            tokens.append(left + right)
        for sequence in sequences:
            merge(sequence, left, right)
    return tokens


def merge(sequence: list[bytes], left: bytes, right: bytes) -> None:
    """Replace a pair wherever it stands, from the left."""
    place = 0
    while place < len(sequence) - 1:
        if sequence[place : place + 2] == [left, right]:
            sequence[place : place + 2] = [left + right]
        place += 1


def write(name: str, value: dict[str, object]) -> None:
    """One line for each entry of a list of objects, and one for everything else."""
    lines = list[str]()
    for key, entry in value.items():
        if isinstance(entry, list) and entry and isinstance(entry[0], dict):
            text = "[\n" + ",\n".join(json.dumps(one, ensure_ascii=True) for one in entry) + "\n]"
        else:
            text = json.dumps(entry)
        lines.append(f"{json.dumps(key)}: {text}")
    (FOLDER / name).write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
