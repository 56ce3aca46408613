"""Paged attention on a GPU: the two kernels, how they are shaped, and what a step plans for them.

Rows with few new tokens are cut into spans of KV and worked off by `attention_decode`, the others
by `attention_prompt`; a step may hold both. docs/flash_attention.md says how and why.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from roofline.ops import KvCache
from roofline.ops.gpu.attention_decode import TASK_WORDS, decode, plan_tasks
from roofline.ops.gpu.attention_prompt import prompt
from roofline.ops.gpu.triton_support import launch

_LOG2_E = 1 / math.log(2)
_DECODE_ROWS = 16  # the smallest side of a tensor-core product: tokens x query heads a KV head
_REGISTERS = 1 << 16  # of a multiprocessor


@dataclass(frozen=True)
class Heads:
    """The shape of a model's attention on this rank."""

    query: int
    kv: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query // self.kv

    @property
    def width(self) -> int:
        """Channels of a head as tensor cores take them: a power of two."""
        return max(16, _power_of_two(self.dim))


@dataclass(frozen=True)
class Shape:
    """Constants a kernel is compiled with, which decide its speed and, bit for bit, its sums."""

    rows: int  # query lines of a tile: tokens x query heads of one KV head
    tile: int  # positions of KV a turn
    warps: int
    stages: int  # turns of KV in shared memory or on their way there, and one
    resident: int = 1  # programs of a multiprocessor: their registers are bounded accordingly

    @property
    def registers(self) -> int | None:
        """Of a thread, at most; None: as many as there are."""
        return None if self.resident < 3 else _REGISTERS // (self.resident * 32 * self.warps) & ~7


def decode_shapes(heads: Heads, activation: torch.dtype, cache: torch.dtype) -> tuple[Shape, ...]:
    """How `decode` runs: as many bytes on their way as fit, in two or three programs.

    And in four, for rows that four have one task of each, and three one or two.
    """
    turn_bytes = 2 * 64 * heads.width * cache.itemsize
    rows = max(_DECODE_ROWS, _power_of_two(heads.group))
    if turn_bytes > 64 * 1024:
        return (Shape(rows, tile=32, warps=4, stages=2, resident=1),)
    if heads.width > 128 or activation.itemsize > 2 or rows > 16:
        return (Shape(rows, tile=64, warps=4, stages=2, resident=2),)
    three = Shape(rows, tile=64, warps=4, stages=3, resident=3)
    if heads.width != 128 or cache.itemsize != 2:
        return (three,)
    return three, Shape(rows, tile=32, warps=4, stages=3, resident=4)


def prompt_shape(heads: Heads, activation: torch.dtype) -> Shape:
    """How `prompt` runs: a tile of KV is used by as many query lines as registers hold."""
    least = _power_of_two(heads.group)
    if heads.width > 128 and activation.itemsize > 2:
        return Shape(max(32, least), tile=32, warps=4, stages=2)
    if heads.width > 128 or activation.itemsize > 2:
        return Shape(max(64, least), tile=32, warps=4, stages=2)
    return Shape(max(128, least), tile=64, warps=8, stages=3)


@dataclass(frozen=True)
class Tasks:
    """What a step's attention is cut into. Allocated once, filled on the device by `plan`."""

    words: Tensor  # [8 * (1 + capacity)] int32
    arrivals: Tensor  # [rows, Hkv] int32, zero between launches
    heads: Heads
    decodes: tuple[Shape, ...]  # of as many query lines each
    processors: int
    prompt: Shape
    deterministic: bool  # all rows by `prompt`, whose sums depend on nothing but the row

    @property
    def capacity(self) -> int:
        """Tasks there is room for."""
        return len(self.words) // TASK_WORDS.value - 1

    @property
    def scratch_floats(self) -> int:
        """Float32 elements of scratch `attention` needs."""
        return self.capacity * self.heads.kv * self.decodes[0].rows * (self.heads.width + 2)

    def decode_of(self, rows: int) -> Shape:
        """How a step of so many rows is decoded."""
        first, *others = self.decodes
        pieces = rows * self.heads.kv
        if pieces <= self.programs(first):  # they are cut into as many as there are programs
            return first
        return next((shape for shape in others if pieces <= self.programs(shape)), first)

    def programs(self, shape: Shape) -> int:
        """Of `decode`."""
        return self.processors * shape.resident


def make_tasks(
    heads: Heads,
    activation: torch.dtype,
    cache: torch.dtype,
    rows: int,  # of the device-side tables
    device: torch.device,
    *,
    deterministic: bool,
) -> Tasks:
    """Room for the tasks of any step."""
    shapes, processors = decode_shapes(heads, activation, cache), _processors(device)
    capacity = rows + 2 * -(-processors * shapes[0].resident // heads.kv)
    return Tasks(
        torch.zeros(TASK_WORDS.value * (1 + capacity), dtype=torch.int32, device=device),
        torch.zeros(rows, heads.kv, dtype=torch.int32, device=device),
        heads,
        shapes,
        processors,
        prompt_shape(heads, activation),
        deterministic,
    )


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter runs programs one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan(
    tasks: Tasks,
    query_start: Tensor,  # [R + 1] int32
    context_len: Tensor,  # [R] int32
    window: int | None,  # the widest of the model's layers; None: some layer has none
    *,
    pdl: bool,
) -> None:
    """Cut this step's rows into tasks; once before the layers, inside the captured step."""
    if tasks.deterministic:
        return
    rows = len(context_len)
    shape = tasks.decode_of(rows)
    table_rows = _power_of_two(rows)
    share = max(8, min(64, (1 << 14) // table_rows))
    launch(
        plan_tasks,
        (-(-tasks.capacity // share),),
        pdl,
        query_start,
        context_len,
        tasks.words,
        tasks.arrivals,
        rows,
        tasks.capacity,
        tasks.programs(shape),
        window or 0,
        KV_HEADS=tasks.heads.kv,
        GROUP=tasks.heads.group,
        ROWS=shape.rows,
        TILE=shape.tile,
        TABLE_ROWS=table_rows,
        SHARE=share,
        WINDOWED=window is not None,
        num_warps=4,
    )


def attention(
    query: Tensor,  # [T, Hq, D] activation dtype
    kv_cache: KvCache,
    layer: int,
    block_table: Tensor,  # [R, B] int32
    query_start: Tensor,  # [R + 1] int32
    context_len: Tensor,  # [R] int32
    tasks: Tasks,  # of this step: `plan`
    scale: float,
    window: int | None,  # tokens a query sees, itself included; None: all before it
    out: Tensor,  # [T, Hq, D]
    scratch: Tensor,  # [tasks.scratch_floats or more] float32
    *,
    longest: int,  # new tokens of a row of this step, at most
    pdl: bool,
) -> None:
    """Causal attention of each row's last tokens over its paged context; see `Ops.attention`.

    A query head h reads KV head h // group. Values and keys of an INT8 or FP8 cache are multiplied
    by their scales in float32: as scores, and as the weights of values.
    """
    heads = tasks.heads
    assert query.is_contiguous() and out.is_contiguous() and block_table.stride(1) == 1
    assert query.shape[1:] == (heads.query, heads.dim) == out.shape[1:]
    assert kv_cache.values.is_contiguous() and len(context_len) <= len(tasks.arrivals)
    assert scratch.numel() >= tasks.scratch_floats or tasks.deterministic
    keys, values = kv_cache.values[layer]
    scales = kv_cache.values[layer] if kv_cache.scales is None else kv_cache.scales[layer]
    cache = keys, values, *scales, block_table
    options = dict(
        KV_HEADS=heads.kv,
        GROUP=heads.group,
        BLOCK_TOKENS=keys.shape[2],
        DIM=heads.dim,
        WIDTH=heads.width,
        QUANTIZED=kv_cache.scales is not None,
        WINDOWED=window is not None,
    )
    numbers = block_table.stride(0), window or 0, scale * _LOG2_E
    rows = len(context_len)
    shape = tasks.decode_of(rows)
    if not tasks.deterministic:
        lines = tasks.capacity * heads.kv * shape.rows
        mixtures, sums = scratch[: lines * heads.width], scratch[lines * heads.width :]
        launch(
            decode,
            (tasks.programs(shape),),
            pdl,
            query,
            *cache,
            tasks.words,
            tasks.arrivals,
            mixtures,
            sums,
            out,
            *numbers,
            ROWS=shape.rows,
            TILE=shape.tile,
            num_warps=shape.warps,
            num_stages=shape.stages,
            maxnreg=shape.registers,
            **options,
        )
    fewest = 0 if tasks.deterministic else shape.rows
    if len(query) and longest * heads.group > fewest:
        shape = tasks.prompt
        tiles = len(query) // (shape.rows // heads.group) + rows
        launch(
            prompt,
            (tiles, heads.kv),
            pdl,
            query,
            *cache,
            query_start,
            context_len,
            out,
            rows,
            *numbers,
            TABLE_ROWS=_power_of_two(rows),
            FEWEST=fewest,
            ROWS=shape.rows,
            TILE=shape.tile,
            num_warps=shape.warps,
            num_stages=shape.stages,
            **options,
        )


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
