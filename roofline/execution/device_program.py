"""A step's computation on a device, from what was uploaded to the tokens: op by op, or captured.

Two halves, between which the host may change logits. A step in which every row decodes one token is
captured per padded size, at its second use: the first runs op by op, so that no token waits for a
capture and every kernel is compiled before one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from roofline.execution.arena import Arena
from roofline.execution.inputs import step_inputs
from roofline.models.decoder import Buffers, Decoder
from roofline.ops import KvCache, Ops
from roofline.ops.cuda import Graphs
from roofline.upload import upload_layout


class DeviceProgram:
    """Steps of one size, on views of the arena."""

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        kv_cache: KvCache,
        arena: Arena,
        tokens: int,
        sampled: int,
        longest: int,
    ) -> None:
        self._decoder, self._ops, self._kv_cache = decoder, ops, kv_cache
        self._tokens, self._longest = tokens, longest
        rows = len(arena["last_token"]) - 1
        upload = upload_views(arena["upload"], tokens, sampled, rows)
        chosen = arena["result"][1 : 1 + sampled]
        self.fields = arena | upload | {"chosen": chosen}
        self.logits = arena["logits"][:sampled]

    def compute(self) -> None:
        """Run the layers, write logits, and in the result's first item whether all are finite."""
        f = self.fields
        ids = f["token_ids"]
        ids.copy_(torch.where(ids < 0, f["last_token"][f["token_rows"]], ids))
        inputs = step_inputs(f, self._tokens, self._longest)
        buffers = self._buffers(self._tokens)
        self._decoder.forward(self._ops, inputs, self._kv_cache, buffers)
        if len(self.logits):
            self.head(f["sampled"], self.logits)
            self._ops.flag_finite(self.logits, f["result"][:1])

    def head(self, sampled: Tensor, out: Tensor) -> None:
        """Logits of some tokens of the step."""
        f = self.fields
        shard = f["logits_shard"][: len(out)] if "logits_shard" in f else out
        buffers = self._buffers(len(f["residual"]))
        self._decoder.logits(self._ops, sampled, buffers, shard, out)

    def choose(self, truncates: bool) -> None:
        """Pick a token from each row of logits, truncated or not; keep it as its row's last."""
        f = self.fields
        if truncates:
            self.logits.div_(f["divisor"].unsqueeze(1))
            self._ops.truncate(self.logits, f["min_p"], f["top_k"], f["top_p"])
        names = "temperature", "seed", "choice_position", "chosen"
        self._ops.choose(self.logits, *(f[name] for name in names))
        f["last_token"].index_copy_(0, f["choice_rows"], f["chosen"])

    def _buffers(self, tokens: int) -> Buffers:
        names = "residual", "delta", "query", "attended", "activated"
        return Buffers(*(self.fields[name][:tokens] for name in names), rope=self.fields["rope"])


class CapturedProgram:
    """A program replayed from its second run on."""

    def __init__(self, program: DeviceProgram, graphs: Graphs) -> None:
        self.program, self._graphs = program, graphs
        self._replays: dict[str, Callable[[], None] | None] = {}

    def compute(self) -> None:
        """See `DeviceProgram`."""
        self._run("compute", self.program.compute)

    def choose(self, truncates: bool) -> None:
        """See `DeviceProgram`."""
        part = "truncate and choose" if truncates else "choose"
        self._run(part, partial(self.program.choose, truncates))

    def _run(self, part: str, run: Callable[[], None]) -> None:
        if part not in self._replays:
            self._replays[part] = None
            run()
            return
        replay = self._replays[part]
        if replay is None:
            replay = self._replays[part] = self._graphs.capture(run)
        replay()


def upload_views(upload: Tensor, tokens: int, sampled: int, rows: int) -> dict[str, Tensor]:
    """The fields of an upload of so many tokens and samples, but for its new blocks."""
    layout = upload_layout(tokens, sampled, rows, 0)
    return {
        name: view(upload, *place)
        for name, place in layout.items()
        if name not in ("block_places", "block_ids")
    }


def view(upload: Tensor, start: int, count: int, dtype: str) -> Tensor:
    """`count` numbers from a byte of an upload on."""
    item = getattr(torch, dtype)
    return upload[start : start + count * item.itemsize].view(item)


def padded_sizes(most: int) -> list[int]:
    """Sizes of captured steps: 1, 2, 4, 8, then every 8, up to `most` rows."""
    return sorted({min(size, most) for size in (1, 2, 4, *range(8, most + 8, 8))})
