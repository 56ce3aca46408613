"""Keeps what callers write in messages from becoming special tokens, whatever the template does.

Special tokens' texts in messages go through the template as placeholders that nobody can guess, and
come out as text. Everything else stays as it is, for templates look into their messages.
"""

import bisect
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from roofline.errors import RequestError, shown

_MAX_DEPTH = 64  # levels of nesting in a message
_MAX_INTEGER_BITS = 1024

_NOT_WRITTEN = "continue_final_message: the chat template does not write the final message as it is"

# Values that templates compare with: a caller chooses among them, but cannot forge with them.
_WORDS = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython", "text"}
)


class SpecialTexts:
    """The texts of a tokenizer's special tokens, and how other texts could come to hold one."""

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        whole = "|".join(map(re.escape, longest_first)) or "(?!)"
        starts = "|".join(sorted({re.escape(text[0]) for text in longest_first})) or "(?!)"
        self.whole = re.compile(whole)
        # Templates may change the case of what they are given.
        self.whole_or_start = re.compile(f"({whole})|(?:{starts})+", re.IGNORECASE)
        self._texts = sorted(text.casefold() for text in longest_first)
        self._reversed = sorted(text[::-1] for text in self._texts)
        self._joined = "\n".join(self._texts)
        self._longest = max(map(len, self._texts), default=0)

    def written_by_template(self, pieces: Sequence[str]) -> list[str]:
        """The special tokens in a rendering's own pieces, in order."""
        return [text for piece in pieces[::2] for text in self.whole.findall(piece)]

    def may_come_of(self, text: str) -> bool:
        """Whether a template could make a special token of this.

        By writing it beside other text (an end of it is a piece of one), or by cutting some of it
        out (it has all the letters in order).
        """
        text = text.strip().casefold()
        if not text or text in _WORDS:
            return False
        return (
            text in self._joined
            or any(
                _any_begins(self._texts, text[-n:])
                or _any_begins(self._reversed, text[n - 1 :: -1])
                for n in range(1, min(self._longest, len(text) + 1))
            )
            or any(_in_order(special, text) for special in self._texts)
        )


def render_untrusted(
    render: Callable[[Mapping[str, Any]], str],
    specials: SpecialTexts,
    untrusted: Mapping[str, Any],
    trusted: Mapping[str, Any],
    *,
    continue_final_message: bool = False,
) -> list[str]:
    """What a template's `render` writes, in pieces, to the end of a final message to be continued.

    Those at odd indices are special tokens' texts that came with `untrusted`: not for parsing.
    """
    placeholders = _Placeholders(specials)

    def pieces_with(change: Callable[[str], str]) -> list[str]:
        values = {name: _changed(value, change, name) for name, value in untrusted.items()}
        if continue_final_message:
            placeholders.mark_end(values["messages"][-1])
        try:
            rendered = render({**trusted, **values})
        except RequestError as error:
            message = "".join(placeholders.pieces(error.message))
            raise RequestError(message, param=error.param, code=error.code) from error
        if continue_final_message:
            rendered = placeholders.before_end(rendered)
        return placeholders.pieces(rendered)

    pieces = pieces_with(placeholders.hide)
    if placeholders.met_fragments:
        guarded = pieces_with(placeholders.guard)
        if specials.written_by_template(guarded) != specials.written_by_template(pieces):
            pieces = guarded
    if placeholders.remain_in(pieces):
        raise RequestError(
            "the chat template takes apart a message that holds the text of a special token"
        )
    if continue_final_message and _final_text(untrusted).strip() not in "".join(pieces):
        raise RequestError(_NOT_WRITTEN)
    return pieces


def _final_text(untrusted: Mapping[str, Any]) -> str:
    """The text at the end of a conversation, in the last part of the last content."""
    content = untrusted["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class _Placeholders:
    """One rendering's stand-ins for texts: digits nobody can guess, between two control characters.

    JSON (and Python's repr) escapes control characters, so that a placeholder shows when it stands
    there; digits have no upper case and nothing to trim.
    """

    def __init__(self, specials: SpecialTexts) -> None:
        self.met_fragments = False
        self._specials = specials
        self._nonce = f"{secrets.randbits(128):039d}"
        self._indices = {"": 0}  # by the text that is stood in for; nothing for a mere joint
        self._end = f"\x01{self._nonce}end\x01"
        mark = r"(?:\x01|\\+u0001|\\+x01)"
        self._pattern = re.compile(rf"{mark}{self._nonce}([0-9]+){mark}")

    def hide(self, text: str) -> str:
        """Stand in for the special tokens' texts in a text."""
        self.met_fragments = self.met_fragments or self._specials.may_come_of(text)
        return self._specials.whole.sub(lambda found: self._stand_in(found[0]), text)

    def guard(self, text: str) -> str:
        """Hide, and break up all that a template could make a special token of.

        Joints go within white space at the ends, which templates trim.
        """
        if not self._specials.may_come_of(text):
            return self.hide(text)
        joint = self._stand_in("")
        core = self._specials.whole_or_start.sub(
            lambda found: self._stand_in(found[0]) if found[1] else found[0] + joint, text.strip()
        )
        before, _, after = text.partition(text.strip())
        return f"{before}{joint}{core}{joint}{after}"

    def pieces(self, rendered: str) -> list[str]:
        """Cut a rendering at its placeholders, with the texts they stood in for at odd indices."""
        texts = list(self._indices)
        pieces: list[str] = []
        end = 0
        for found in self._pattern.finditer(rendered):
            text = texts[int(found[1])]
            if found[0].startswith("\\"):
                text = json.dumps(text, ensure_ascii=False)[1:-1]
            pieces += [rendered[end : found.start()], text]
            end = found.end()
        pieces.append(rendered[end:])
        return pieces

    def mark_end(self, message: dict[str, Any]) -> None:
        """Mark where a message's content ends; the space after shows if the template trims it."""
        content = message["content"]
        if isinstance(content, str):
            message["content"] = f"{content}{self._end} "
        else:
            content[-1]["text"] += f"{self._end} "

    def before_end(self, rendered: str) -> str:
        """A rendering up to its mark, where the message goes on."""
        before, mark, after = rendered.rpartition(self._end)
        if not mark:
            raise RequestError(_NOT_WRITTEN)
        before = before.replace(f"{self._end} ", "")  # written before as well
        return before if after.startswith(" ") else before.rstrip()

    def remain_in(self, pieces: Sequence[str]) -> bool:
        """Whether the template cut a placeholder up: half of one is left in its text."""
        halves = self._nonce[:19], self._nonce[19:]
        return any(half in own for own in pieces[::2] for half in halves)

    def _stand_in(self, text: str) -> str:
        index = self._indices.setdefault(text, len(self._indices))
        return f"\x01{self._nonce}{index}\x01"


def _changed(value: object, change: Callable[[str], str], where: str, depth: int = 0) -> Any:
    """Copy what JSON can hold, with its strings changed; names that templates look up stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise RequestError(f"{where} is {shown(value)}; at most {_MAX_INTEGER_BITS} are taken")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if depth == _MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, (list, tuple)):
        return [
            _changed(item, change, f"{where}[{index}]", depth + 1)
            for index, item in enumerate(value)
        ]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {
            key if key.isidentifier() else change(key): _changed(
                item, change, f"{where}.{key}", depth + 1
            )
            for key, item in value.items()
        }
    raise RequestError(
        f"{where} is {type(value).__name__}; messages hold strings, numbers, booleans, null, "
        "lists, and mappings from strings"
    )


def _any_begins(texts: Sequence[str], beginning: str) -> bool:
    """Whether one of these sorted texts begins so."""
    place = bisect.bisect_left(texts, beginning)
    return place < len(texts) and texts[place].startswith(beginning)


def _in_order(letters: str, text: str) -> bool:
    """Whether a text holds all letters in their order, with anything between."""
    position = -1
    for letter in letters:
        position = text.find(letter, position + 1)
        if position < 0:
            return False
    return True
