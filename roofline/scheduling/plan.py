"""A step on the wire: what the scheduler asks of every rank, and what the ranks answer.

A plan is columns of integers with its own encoding (never pickle): it may cross a process or a
machine. It carries changes, not state; what a change means is said at the field. No planning here.
"""

import dataclasses
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Self

from roofline.errors import RooflineError
from roofline.request import Request, TokenLogprobs

ON_DEVICE = -1  # in token_ids: the row's last sampled token, which the host has not seen yet
NONE = -1  # no mask, no logprobs

_MAGIC = 0x31504C52  # "RLP1" in a file; scrambled by the other byte order
_HEADER = ("magic", "step", "entries", "tokens", "blocks", "starts", "masks", "mask_words")


@dataclasses.dataclass(frozen=True, slots=True)
class RowStart:
    """A request that begins in a row, or begins again after preemption; the row forgets all else.

    Its block table is empty: the plan's entry for the row brings every block, shared ones included.
    """

    row: int
    num_prompt: int  # tokens before the first output token, whatever was computed before
    seed: int  # unsigned 64 bits
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0  # stop_ids cannot be sampled before the output has this many tokens
    logprobs: int = NONE  # how many of the likeliest beside the sampled token; -1 = none at all
    prompt_logprobs: int = NONE  # the same for prompt[1:], from this row's entries
    stop_ids: tuple[int, ...] = ()  # empty unless min_tokens needs them
    allowed_token_ids: tuple[int, ...] = ()  # empty = all
    history: tuple[
        int, ...
    ] = ()  # all tokens known: for penalties, bad words, prompt_logprobs only
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)

    @classmethod
    def of(cls, request: Request) -> Self:
        """Tell what a worker must know of a request that enters `request.row`."""
        sampling = request.sampling
        top = sampling.logprobs
        # They are delivered once: a request that starts again has them or collects from the start.
        prompt_top = sampling.prompt_logprobs if request.prompt_logprobs is not None else None
        looks_back = sampling.has_penalties or request.bad_words_ids or prompt_top is not None
        return cls(
            row=request.row,
            num_prompt=request.num_prompt,
            seed=request.seed,
            temperature=float(sampling.temperature),
            top_k=max(sampling.top_k, 0),
            top_p=float(sampling.top_p),
            min_p=float(sampling.min_p),
            repetition_penalty=float(sampling.repetition_penalty),
            presence_penalty=float(sampling.presence_penalty),
            frequency_penalty=float(sampling.frequency_penalty),
            min_tokens=sampling.min_tokens,
            logprobs=NONE if top is None else top,
            prompt_logprobs=NONE if prompt_top is None else prompt_top,
            stop_ids=tuple(sorted(request.stop_ids)) if sampling.min_tokens else (),
            allowed_token_ids=tuple(sampling.allowed_token_ids or ()),
            history=tuple(request.tokens) if looks_back else (),
            bad_words=request.bad_words_ids,
            logit_bias=tuple((sampling.logit_bias or {}).items()),
        )


@dataclasses.dataclass(slots=True)
class StepPlan:
    """One step. An entry computes `counts[i]` tokens of the request in `rows[i]`.

    Entry i owns the next `counts[i]` of `token_ids` and the next `block_counts[i]` of `block_ids`.
    A row has at most one entry.
    """

    step: int  # counts plans, from 0
    starts: list[RowStart] = dataclasses.field(default_factory=list)  # applied before the entries
    rows: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)  # of the entry's first token
    counts: list[int] = dataclasses.field(default_factory=list)  # tokens computed, at least 1
    samples: list[int] = dataclasses.field(default_factory=list)  # trailing positions sampled
    masks: list[int] = dataclasses.field(default_factory=list)  # place in mask_bits, or NONE
    block_counts: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)  # or ON_DEVICE
    block_ids: list[int] = dataclasses.field(default_factory=list)  # appended to the row's table
    # What the one position sampled by a masked entry may become: bit i % 8 of byte i // 8 is token
    # i's. As many whole words of 64 bits as the vocabulary needs, in all of them.
    mask_bits: list[bytes] = dataclasses.field(default_factory=list)

    def add(
        self,
        row: int,
        position: int,
        token_ids: list[int],
        samples: int,
        block_ids: list[int],
        mask: bytes | None = None,
    ) -> None:
        """Append one entry."""
        self.rows.append(row)
        self.positions.append(position)
        self.counts.append(len(token_ids))
        self.samples.append(samples)
        self.masks.append(NONE if mask is None else len(self.mask_bits))
        if mask is not None:
            self.mask_bits.append(mask)
        self.block_counts.append(len(block_ids))
        self.token_ids += token_ids
        self.block_ids += block_ids

    def encode(self) -> bytes:
        """Return the plan as 64-bit integers in this machine's byte order, then the masks."""
        header = (_MAGIC, self.step, len(self.rows), len(self.token_ids), len(self.block_ids))
        masks, mask_words = (
            len(self.mask_bits),
            len(self.mask_bits[0]) // 8 if self.mask_bits else 0,
        )
        words = array("q", (*header, len(self.starts), masks, mask_words))
        for column in self._columns():
            words.extend(column)
        for start in self.starts:
            _write_start(words, start)
        return b"".join((words.tobytes(), *self.mask_bits))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read what `encode` wrote; anything else is refused whole."""
        reader = _Reader(data)
        magic, step, entries, tokens, blocks, starts, masks, mask_words = reader.take(len(_HEADER))
        if magic != _MAGIC:
            raise _garbage(f"its first word is {magic:#x}, not {_MAGIC:#x}")
        plan = cls(step)
        plan.rows, plan.positions, plan.counts = (reader.take(entries) for _ in range(3))
        plan.samples, plan.masks, plan.block_counts = (reader.take(entries) for _ in range(3))
        plan.token_ids, plan.block_ids = reader.take(tokens), reader.take(blocks)
        reader.claim(starts)
        plan.starts = [_read_start(reader) for _ in range(starts)]
        if bool(masks) != bool(mask_words):
            raise _garbage(f"it claims {masks} masks of {mask_words} words")
        reader.claim(masks)
        plan.mask_bits = [reader.take_bytes(mask_words) for _ in range(masks)]
        reader.finish()
        plan._check()
        return plan

    def _columns(self) -> tuple[list[int], ...]:
        return (
            self.rows,
            self.positions,
            self.counts,
            self.samples,
            self.masks,
            self.block_counts,
            self.token_ids,
            self.block_ids,
        )

    def _check(self) -> None:
        """Refuse numbers that would lead a worker outside its tables."""
        rows = self.rows
        started = [start.row for start in self.starts]
        masked = [
            (slot, s) for slot, s in zip(self.masks, self.samples, strict=True) if slot != NONE
        ]
        sound = {
            "step": self.step >= 0,
            "rows": len(set(rows)) == len(rows) and min(rows, default=0) >= 0,
            "positions": min(self.positions, default=0) >= 0,
            "counts": min(self.counts, default=1) >= 1 and sum(self.counts) == len(self.token_ids),
            "samples": all(0 <= s <= n for s, n in zip(self.samples, self.counts, strict=True)),
            "masks": masked == [(slot, 1) for slot in range(len(self.mask_bits))],
            "block_counts": min(self.block_counts, default=0) >= 0
            and sum(self.block_counts) == len(self.block_ids),
            "token_ids": min(self.token_ids, default=0) >= ON_DEVICE,
            "block_ids": min(self.block_ids, default=0) >= 0,
            "starts": len(set(started)) == len(started) and set(started) <= set(rows),
        }
        for name, good in sound.items():
            if not good:
                raise _garbage(f"its {name} are out of bounds")


@dataclasses.dataclass(slots=True)
class StepResult:
    """What a step sampled, entry by entry in the plan's order."""

    counts: list[int]  # tokens an entry gained: 0 if it sampled nothing, at most samples[i]
    token_ids: list[int]  # all entries' tokens one after the other
    # Only entries that asked: entry index -> one for each of its tokens.
    logprobs: dict[int, list[TokenLogprobs]] = dataclasses.field(default_factory=dict)
    # Entry at position p with n tokens -> of prompt[p + 1 : p + n + 1], as far as the prompt goes.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = dataclasses.field(default_factory=dict)


def _write_start(words: "array[int]", start: RowStart) -> None:
    words.extend((start.row, start.num_prompt, start.top_k, start.min_tokens))
    words.extend((start.logprobs, start.prompt_logprobs, _signed(start.seed)))
    words.extend(map(_bits, (start.temperature, start.top_p, start.min_p)))
    penalties = (start.repetition_penalty, start.presence_penalty, start.frequency_penalty)
    words.extend(map(_bits, penalties))
    for ids in (start.stop_ids, start.allowed_token_ids, start.history):
        _write_list(words, ids)
    words.append(len(start.bad_words))
    for word in start.bad_words:
        _write_list(words, word)
    _write_list(words, [token for token, _ in start.logit_bias])
    words.extend(_bits(bias) for _, bias in start.logit_bias)


def _read_start(reader: "_Reader") -> RowStart:
    row, num_prompt, top_k, min_tokens, logprobs, prompt_logprobs, seed = reader.take(7)
    temperature, top_p, min_p, repetition, presence, frequency = map(_double, reader.take(6))
    stop_ids, allowed, history = (reader.take_list() for _ in range(3))
    (num_words,) = reader.take(1)
    reader.claim(num_words)
    bad_words = tuple(reader.take_list() for _ in range(num_words))
    biased = reader.take_list()
    biases = map(_double, reader.take(len(biased)))
    if row < 0 or num_prompt < 1 or min(top_k, min_tokens) < 0:
        raise _garbage("a start is out of bounds")
    return RowStart(
        row=row,
        num_prompt=num_prompt,
        seed=seed & (2**64 - 1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_ids=stop_ids,
        allowed_token_ids=allowed,
        history=history,
        bad_words=bad_words,
        logit_bias=tuple(zip(biased, biases, strict=True)),
    )


def _write_list(words: "array[int]", values: Sequence[int]) -> None:
    words.append(len(values))
    words.extend(values)


class _Reader:
    """Words taken off the front of a plan; a length is believed only if that many are left."""

    def __init__(self, data: bytes) -> None:
        self._words = array("q")
        if len(data) % self._words.itemsize:
            raise _garbage(f"{len(data)} bytes are not whole words")
        self._words.frombytes(data)
        self._at = 0

    def take(self, count: int) -> list[int]:
        self.claim(count)
        start, self._at = self._at, self._at + count
        return self._words[start : self._at].tolist()

    def take_bytes(self, count: int) -> bytes:
        """Take words that are no numbers."""
        self.claim(count)
        start, self._at = self._at, self._at + count
        return self._words[start : self._at].tobytes()

    def take_list(self) -> tuple[int, ...]:
        (count,) = self.take(1)
        return tuple(self.take(count))

    def claim(self, count: int) -> None:
        """Refuse to read `count` things of at least one word each where fewer words are left."""
        left = len(self._words) - self._at
        if not 0 <= count <= left:
            raise _garbage(f"it claims {count} words where {left} are left")

    def finish(self) -> None:
        if self._at != len(self._words):
            raise _garbage(f"{len(self._words) - self._at} words are left over")


def _bits(number: float) -> int:
    return struct.unpack("=q", struct.pack("=d", number))[0]


def _double(bits: int) -> float:
    return struct.unpack("=d", struct.pack("=q", bits))[0]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _garbage(why: str) -> RooflineError:
    return RooflineError(
        f"step plan from another process is broken: {why} ({sys.byteorder} endian)"
    )
