"""What a tokenizer.json may do to a text before merges: nothing that takes forever or grows it.

A pattern that repeats a group can take time exponential in a text: (a+)+b tries 10 million ways at
24 letters. Steps that lengthen a text can double it again and again. No model needs either.
"""

import re
from collections.abc import Iterator
from typing import Any

from roofline.errors import shown

_NORMALIZERS = ("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Strip")
_MAX_PREPENDED = 16  # characters; SentencePiece's is one

# Oniguruma's syntax without what repeats a group, by a quantifier or by its name or number.
_PATTERN = re.compile(
    r"""(?: \( (?: \?(?: [:=!>] | <[=!] | [im-]+[:)] ) )?         # a group, a look around, a flag
          | \) \??+                                               # may be left out, not repeated
          | [|^$]
          | (?: \\[pP]\{\^?\w+\} | \\x\{[0-9a-fA-F]+\} | \\[^gk0-9]
              | \[ (?: \\. | \[ (?: \\. | [^][\\] )*+ \] | [^][\\] )++ \]
              | [^][\\(){}|^$*+?] )
            (?: [*+?][+?]? | \{\d*,?\d*\}\?? )?+
        )*+""",
    re.VERBOSE | re.DOTALL,
)


def runaway_step(normalizer: object, pre_tokenizer: object) -> str | None:
    """Say what of these objects of a tokenizer.json is refused, and what works; None if all is."""
    for step in _steps(normalizer):
        kind = step.get("type")
        if kind not in ("Sequence", *_NORMALIZERS):
            return (
                f"normalizer {shown(kind)} is not supported; supported: {', '.join(_NORMALIZERS)}"
            )
        if kind == "Prepend" and len(str(step.get("prepend"))) > _MAX_PREPENDED:
            return f"normalizer Prepend is longer than {_MAX_PREPENDED} characters"
        if kind == "Replace" and not _keeps_length(step):
            return "normalizer Replace is supported where it makes no text longer, of a String"
    steps = list(_steps(pre_tokenizer))
    if [step.get("type") for step in steps].count("ByteLevel") > 1:
        return "pre_tokenizer ByteLevel is there twice; once is supported"
    for step in steps:
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str) and not _PATTERN.fullmatch(regex):
            return f"pattern {shown(regex)} is not supported; supported: those that repeat no group"
    return None


def _steps(value: object) -> Iterator[dict[str, Any]]:
    """An object and every one in it that has a type."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            if "type" in inner:
                yield inner
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner


def _keeps_length(step: dict[str, Any]) -> bool:
    pattern, content = step.get("pattern"), step.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    return isinstance(text, str) and isinstance(content, str) and len(content) <= len(text)
