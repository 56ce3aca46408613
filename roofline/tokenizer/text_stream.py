"""Text from token ids as they come: whole characters only, and stop strings never shown in part.

Which tokens a request produces, and when it ends, is the engine's business.
"""

import codecs
from collections.abc import Iterable, Sequence

from roofline.errors import RequestError
from roofline.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Turns one answer's token ids into text that is safe to show.

    What is shown, joined, is the decoded text without an unfinished character at its end; `after`
    are ids that the text goes on from (they decode to whole characters), so that a first space is
    kept where there is text before it. The first stop string to be completed ends it; of several
    completed by the same character, the longest. That does not depend on how the text was cut into
    tokens. The work is linear in the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: str | Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        after: Iterable[int] = (),
    ) -> None:
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._begins_text = self._hidden.issuperset(after)
        self._includes_stop = include_stop_str_in_output
        self._stops = [_StopString(text) for text in ([stop] if isinstance(stop, str) else stop)]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[str] = []
        self._held = ""  # the start of a stop string, perhaps

    def push(self, token_ids: Iterable[int], *, may_stop: bool = True) -> str:
        """Take the next tokens; return the text that has become safe to show.

        Text pushed with `may_stop` false is no part of any stop string: vLLM's `min_tokens`.
        """
        if self.stopped_by is not None:
            return ""
        known = self._tokenizer.vocab_size  # an embedding may have padding rows, which have no text
        data = b"".join(
            self._tokenizer.token_bytes(token)
            for token in token_ids
            if token < known and token not in self._hidden
        )
        if self._begins_text and data:
            self._begins_text, data = False, self._tokenizer.without_lead(data)
        new = self._decoder.decode(data)
        if not may_stop:
            self._shown.append(new)
            return new
        return self._show(new)

    def finish(self) -> str:
        """No more tokens come: return what was held back, without an unfinished character."""
        held, self._held = self._held, ""
        self._shown.append(held)
        return held

    @property
    def text(self) -> str:
        """All that has been shown."""
        return "".join(self._shown)

    def _show(self, new: str) -> str:
        """Move text past the stop strings; return what can no longer become part of one."""
        safe = self._held + new
        held = 0
        if self._stops:
            for position, character in enumerate(new, len(self._held) + 1):
                completed = [stop for stop in self._stops if stop.completed_by(character)]
                if completed:
                    stop = max(completed, key=len)
                    self.stopped_by = stop.text
                    safe = safe[: position if self._includes_stop else position - len(stop)]
                    break
            else:
                held = max(stop.matched for stop in self._stops)
        safe, self._held = safe[: len(safe) - held], safe[len(safe) - held :]
        self._shown.append(safe)
        return safe


class _StopString:
    """One stop string and how much of it the text so far ends with (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop string {text!r} is not a string of one character or more")
        self.text = text
        self.matched = 0  # characters
        self._borders = [0]  # [i]: the longest proper prefix of text[:i + 1] that also ends it
        for character in text[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def __len__(self) -> int:
        return len(self.text)

    def completed_by(self, character: str) -> bool:
        """Read one more character of the text."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.text)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)
