"""Memory arithmetic: the bytes of weights, scales, KV and activations on each rank, and what fits.

The allocator and `roofline fit` call the same functions, so the bytes printed are the bytes used.
Nothing here allocates, reads weights or imports torch.
"""

import bisect
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

from roofline.config import GROUP_SIZES, EngineConfig, ModelConfig, ParallelConfig, WeightFormat
from roofline.errors import CapacityError, UsageError
from roofline.upload import HOST_BUFFERS, upload_bytes, upload_layout

ITEM_BYTES = {
    "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4,
    "float64": 8, "int32": 4, "int64": 8,
}  # fmt: skip
SCALE_BYTES = 4
LOGIT_ROWS = 16  # at least, so that a prompt's logprobs do not pass through the head one by one
SCRATCH_VALUES = 1 << 20  # a slab of dequantised weights that stays in cache, or one row
# On a GPU: sums of a matrix whose columns are cut in splits, [splits, tokens, rows] float32, are of
# at most so many tokens and rows of all splits; a matrix of so many rows at most is turned into
# floats for the library, and the product before SwiGLU is made for so many tokens at a time.
SPLIT_TOKENS, PARTIAL_ROWS = 64, 32768
DEQUANTIZED_ROWS, LIBRARY_TOKENS = 65536, 2048
ROW_MULTIPLE = 16  # rows of a matrix in memory: the lanes of a SIMD register

NativeGroups = Mapping[str, int]  # group size of each checkpoint tensor that is INT8 on disk


@dataclasses.dataclass(frozen=True)
class Rank:
    """A place in the mesh: who shares the layers, and which stage of them this is."""

    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    tp_rank: int = 0
    stage: int = 0

    @property
    def is_first_stage(self) -> bool:
        """Whether it embeds tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it computes logits."""
        return self.stage == self.parallel.pipeline_parallel_size - 1


@dataclasses.dataclass(frozen=True)
class MatrixPlan:
    """One weight matrix [rows, columns] as a rank holds it."""

    name: str
    rows: int
    columns: int
    group: int  # columns that share a scale; 0: floats of `dtype`
    offset: int  # columns of the first group that lie on another rank
    dtype: str
    keeps_bfloat16: bool = False  # beside INT8

    @property
    def groups(self) -> int:
        """Scales to a row."""
        return -(-(self.columns + self.offset) // self.group) if self.group else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the values, without scales."""
        size = 1 if self.group else ITEM_BYTES[self.dtype]
        return padded_rows(self.rows) * self.columns * size

    @property
    def copy_bytes(self) -> int:
        """Bytes of the bfloat16 copy of INT8."""
        return self.rows * self.columns * 2 if self.group and self.keeps_bfloat16 else 0

    @property
    def scale_bytes(self) -> int:
        """Bytes of the fp32 scales."""
        return padded_rows(self.rows) * self.groups * SCALE_BYTES


def padded_rows(rows: int) -> int:
    """Rows a matrix has in memory."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The four fused matrices of one decoder layer on one rank."""

    qkv: MatrixPlan  # rows: query heads, key heads, value heads
    output: MatrixPlan
    gate_up: MatrixPlan  # rows: gate channels, up channels
    down: MatrixPlan

    def matrices(self) -> tuple[MatrixPlan, ...]:
        """All four, in the order a step reads them."""
        return self.qkv, self.output, self.gate_up, self.down


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """Every weight one rank holds."""

    layers: dict[int, LayerPlan]  # by global layer number
    embedding: MatrixPlan | None  # on the first stage (and on the last when tied)
    head: MatrixPlan | None  # on the last stage, unless tied: then the embedding serves
    vector_values: int  # fp32 RMSNorm weights and biases

    def matrices(self) -> list[MatrixPlan]:
        """Every matrix of the rank."""
        ends = [m for m in (self.embedding, self.head) if m is not None]
        return [m for layer in self.layers.values() for m in layer.matrices()] + ends

    @property
    def weight_bytes(self) -> int:
        """Matrices without their scales but with their copies, and the vectors."""
        held = sum(m.weight_bytes + m.copy_bytes for m in self.matrices())
        return held + 4 * self.vector_values

    @property
    def scale_bytes(self) -> int:
        """Scales of all matrices."""
        return sum(m.scale_bytes for m in self.matrices())

    @property
    def parameters(self) -> int:
        """Weights held, scales not counted."""
        return sum(m.rows * m.columns for m in self.matrices()) + self.vector_values


def plan_model(
    model: ModelConfig, weights: WeightFormat, rank: Rank, native: NativeGroups
) -> ModelPlan:
    """The weights of one rank: column-parallel, then row-parallel; the vocabulary by rows."""
    layers = {
        i: _plan_layer(model, weights, rank, native, i)
        for i in rank.parallel.layers(model, rank.stage)
    }
    vocabulary = len(rank.parallel.vocabulary(model, rank.tp_rank))

    def table(name: str) -> MatrixPlan:
        group = weights.group(model.hidden_size, native.get(name))
        return MatrixPlan(name, vocabulary, model.hidden_size, group, 0, weights.dtype)

    tied = model.tie_word_embeddings
    embedding = head = None
    if rank.is_first_stage or (tied and rank.is_last_stage):
        embedding = table("model.embed_tokens.weight")
    if rank.is_last_stage and not tied:
        head = table("lm_head.weight")
    vectors = (2 * len(layers) + rank.is_last_stage) * model.hidden_size
    if model.qkv_bias:
        vectors += sum(layer.qkv.rows for layer in layers.values())
    if model.qk_norm:
        vectors += len(layers) * 2 * model.head_dim
    return ModelPlan(layers, embedding, head, vectors)


def layer_tensor(layer: int, name: str, kind: str = "weight") -> str:
    """The checkpoint's name of a layer's tensor, such as the weight of `self_attn.q_proj`."""
    return f"model.layers.{layer}.{name}.{kind}"


def _plan_layer(
    model: ModelConfig, weights: WeightFormat, rank: Rank, native: NativeGroups, layer: int
) -> LayerPlan:
    parallel, tp = rank.parallel, rank.tp_rank
    hidden, dim = model.hidden_size, model.head_dim
    query, kv = parallel.query_heads(model, tp), parallel.kv_heads(model, tp)
    channels = parallel.ffn_channels(model, tp)

    def matrix(pieces: tuple[str, ...], rows: int, cut: range, columns: int) -> MatrixPlan:
        """A matrix fused from checkpoint tensors of `columns`, of which the rank holds `cut`."""
        natives = {native.get(layer_tensor(layer, piece)) for piece in pieces}
        group = weights.group(columns, natives.pop() if len(natives) == 1 else None)
        offset = cut.start % group if group else 0
        name = layer_tensor(layer, "+".join(pieces))
        copied = weights.keeps_bfloat16
        return MatrixPlan(name, rows, len(cut), group, offset, weights.dtype, copied)

    whole = range(hidden)
    heads = range(query.start * dim, query.stop * dim)
    return LayerPlan(
        qkv=matrix(QKV, (len(query) + 2 * len(kv)) * dim, whole, hidden),
        output=matrix(("self_attn.o_proj",), hidden, heads, model.query_size),
        gate_up=matrix(GATE_UP, 2 * len(channels), whole, hidden),
        down=matrix(("mlp.down_proj",), hidden, channels, model.intermediate_size),
    )


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The largest step an engine will run, and how long a context may grow."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int

    @property
    def blocks_per_row(self) -> int:
        """Width of the block table."""
        return -(-self.max_model_len // self.block_size)


def plan_step_buffers(
    model: ModelConfig, dtype: str, rank: Rank, step: StepShape
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arena: name -> (shape, dtype) of every buffer a step uses on one rank."""
    tokens, rows = step.max_num_batched_tokens, step.max_num_seqs
    parallel, tp = rank.parallel, rank.tp_rank
    heads = len(parallel.query_heads(model, tp))
    channels = len(parallel.ffn_channels(model, tp))
    hidden = model.hidden_size
    longest_row = max(hidden, heads * model.head_dim, channels)
    qkv_rows = (heads + 2 * len(parallel.kv_heads(model, tp))) * model.head_dim
    layer_values = max(  # of an op's activations, before and after they are multiplied
        tokens * (hidden + qkv_rows) + quantized_values(tokens, hidden),
        quantized_values(tokens, longest_row),
    )
    buffers: dict[str, tuple[tuple[int, ...], str]] = {
        "token_ids": ((tokens,), "int64"),
        "positions": ((tokens,), "int64"),
        "slots": ((tokens,), "int64"),
        "query_start": ((rows + 1,), "int32"),
        "context_len": ((rows,), "int32"),
        "block_table": ((rows, step.blocks_per_row), "int32"),
        "last_token": ((rows,), "int64"),
        "residual": ((tokens, model.hidden_size), "float32"),
        "delta": ((tokens, model.hidden_size), "float32"),
        "query": ((tokens, heads, model.head_dim), dtype),
        "attended": ((tokens, heads, model.head_dim), dtype),
        "activated": ((tokens, channels), dtype),
        "scratch": ((max(SCRATCH_VALUES, longest_row, layer_values),), "float32"),
        "step": ((4,), "int64"),
        "rope": ((2, step.max_model_len, model.head_dim // 2), "float32"),
    }
    if rank.is_last_stage:
        sampled = max(rows, LOGIT_ROWS)
        buffers["sampled"] = ((sampled,), "int64")
        buffers["logits"] = ((sampled, model.vocab_size), "float32")
        buffers["temperature"] = ((sampled,), "float64")
        buffers["min_p"] = ((sampled,), "float32")
        buffers["top_p"] = ((sampled,), "float64")
        for name in ("top_k", "seed", "choice_position", "chosen"):
            buffers[name] = ((sampled,), "int64")
        if parallel.tensor_parallel_size > 1:
            vocabulary = len(parallel.vocabulary(model, tp))
            buffers["logits_shard"] = ((sampled, vocabulary), "float32")
    return buffers


def plan_buffers(
    model: ModelConfig, config: EngineConfig, rank: Rank, step: StepShape, plan: ModelPlan
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arena of the device a model runs on."""
    if config.is_on_gpu:
        return plan_device_buffers(model, config, rank, step, plan)
    return plan_step_buffers(model, config.dtype, rank, step)


def plan_device_buffers(
    model: ModelConfig, config: EngineConfig, rank: Rank, step: StepShape, plan: ModelPlan
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arena of a GPU: what a step is told of comes in one upload, and its tokens go as one."""
    buffers = plan_step_buffers(model, config.dtype, rank, step)
    rows, sampled = step.max_num_seqs, max(step.max_num_seqs, LOGIT_ROWS)
    for name in HOST_BUFFERS:
        buffers.pop(name, None)
    layout = upload_layout(step.max_num_batched_tokens, sampled, rows, rows * step.blocks_per_row)
    buffers["upload"] = (upload_bytes(layout),), "uint8"
    buffers["last_token"] = (rows + 1,), "int64"  # the last is of padding
    buffers["result"] = (sampled + 1,), "int64"  # tokens, and whether all logits were finite
    tokens, copied = step.max_num_batched_tokens, config.weights.keeps_bfloat16
    rooms = (  # of which an op at a time uses one
        buffers["scratch"][0][0],
        gpu_scratch_values(plan, tokens, config.dtype, copied),
        gpu_attention_values(model, rank, rows),
    )
    buffers["scratch"] = (max(rooms),), "float32"
    return buffers


def gpu_attention_values(model: ModelConfig, rank: Rank, rows: int) -> int:
    """Float32 values of partial sums while rows are cut into spans for every multiprocessor."""
    kv_heads = len(rank.parallel.kv_heads(model, rank.tp_rank))
    shared = 1 << (model.num_heads // model.num_kv_heads - 1).bit_length()
    spans = rows + 2 * -(-_MOST_PROGRAMS // kv_heads)
    width = 1 << (model.head_dim - 1).bit_length()
    return spans * kv_heads * max(16, shared) * (max(16, width) + 2)


_MOST_PROGRAMS = 1024  # of attention, at once on a GPU


def gpu_scratch_values(plan: ModelPlan, tokens: int, dtype: str, keeps_floats: bool) -> int:
    """Float32 values that the GPU's linears need on their way, in a step of `tokens` on one rank.

    `keeps_floats`: the copy for long prompts is there, so nothing is dequantised.
    """
    item, padded = ITEM_BYTES[dtype], -(-tokens // 16) * 16
    partial = 4 * SPLIT_TOKENS * PARTIAL_ROWS
    head = plan.head or plan.embedding
    products = [(head, partial)] if head is not None else []
    for layer in plan.layers.values():
        products += [(layer.output, partial), (layer.down, partial)]
        products += [(layer.qkv, max(partial, 4 * tokens * layer.qkv.rows))]  # read by RoPE
        products += [(layer.gate_up, min(tokens, LIBRARY_TOKENS) * layer.gate_up.rows * item)]
    needed = 0
    for matrix, sums in products:
        room = [tokens * matrix.columns * item, tokens * matrix.columns, padded * matrix.groups * 4]
        if matrix.group and not keeps_floats and matrix.rows <= DEQUANTIZED_ROWS:
            room += [matrix.rows * matrix.columns * item]
        needed = max(needed, sum(-(-size // 256) * 64 for size in [*room, sums]))
    return needed


def quantized_values(tokens: int, columns: int) -> int:
    """Float32 values that take as much as activations in INT8, with their steps, at most.

    Operands of 16 bits; of each part of a row its unit, room between tokens, and two numbers each
    of one piece and of one more (`csrc/int8_rounding.h`).
    """
    parts = -(-columns // min(GROUP_SIZES)) + 1  # a cut may begin inside a group
    return tokens * (-(-columns // 2) + 5 * parts)


def buffer_bytes(buffers: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """Bytes of an arena."""
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for shape, dtype in buffers.values())


def kv_block_bytes(model: ModelConfig, dtype: str, rank: Rank, block_size: int) -> int:
    """Bytes of one KV block over all the layers and heads of a rank; `dtype` is the cache's."""
    layers = len(rank.parallel.layers(model, rank.stage))
    heads = len(rank.parallel.kv_heads(model, rank.tp_rank))
    scale_bytes = SCALE_BYTES if is_quantized(dtype) else 0
    return layers * 2 * heads * block_size * (model.head_dim * ITEM_BYTES[dtype] + scale_bytes)


def is_quantized(dtype: str) -> bool:
    """Whether a KV cache of a dtype has scales."""
    return ITEM_BYTES[dtype] == 1


def kv_token_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of KV that one token of context takes over the whole model."""
    return kv_block_bytes(model, dtype, Rank(), 1)


@dataclasses.dataclass(frozen=True)
class RankBudget:
    """Everything one rank allocates, in bytes."""

    model: ModelPlan
    step: StepShape
    num_blocks: int
    kv_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, scales, KV pool and step buffers."""
        return (
            self.model.weight_bytes + self.model.scale_bytes + self.kv_bytes + self.activation_bytes
        )


def plan_rank(
    model: ModelConfig,
    config: EngineConfig,
    rank: Rank,
    native: NativeGroups,
    available_bytes: int,
) -> RankBudget:
    """Size the KV pool and, for `max_model_len="auto"`, the context, to the memory budget.

    Raises CapacityError, with the largest context that fits, when one request of the asked
    length does not, and UsageError for a context longer than the model was made for.
    """
    if config.max_model_len != "auto" and config.max_model_len > model.max_position:
        raise UsageError(
            f"max_model_len {config.max_model_len} is more than the model's context of "
            f"{model.max_position} tokens"
        )
    sizing = _Sizing(model, config, rank, plan_model(model, config.weights, rank, native))
    asked = model.max_position if config.max_model_len == "auto" else config.max_model_len
    planned = sizing.at(asked, available_bytes)
    if planned is None:
        shorter = range(1, asked)
        largest = bisect.bisect_left(
            shorter, True, key=lambda n: sizing.at(n, available_bytes) is None
        )
        if largest and config.max_model_len == "auto":
            planned = sizing.at(largest, available_bytes)
        if planned is None:
            raise CapacityError(sizing.refusal(asked, largest, available_bytes))
    if config.kv_cache_memory_bytes is not None and planned.total_bytes > available_bytes:
        raise CapacityError(
            f"weights, step buffers and a KV pool of {planned.kv_bytes:,} bytes come to "
            f"{planned.total_bytes:,}, and {available_bytes:,} are free; "
            "lower --kv-cache-memory-bytes, --max-model-len or --max-num-seqs"
        )
    return planned


@dataclasses.dataclass(frozen=True)
class _Sizing:
    """What one rank would hold at any length of context."""

    model: ModelConfig
    config: EngineConfig
    rank: Rank
    weights: ModelPlan

    def at(self, length: int, available_bytes: int) -> RankBudget | None:
        """The rank's budget at a context of `length` tokens; None if not one such request fits."""
        step, activation_bytes = self._step(length)
        block_bytes = self._block_bytes()
        room = self._kv_room(activation_bytes, available_bytes)
        rows = self.config.limits.max_num_seqs
        blocks = min(room // block_bytes, rows * step.blocks_per_row)
        if blocks < step.blocks_per_row:
            return None
        return RankBudget(self.weights, step, blocks, blocks * block_bytes, activation_bytes)

    def refusal(self, asked: int, largest: int, available_bytes: int) -> str:
        """Why a context does not fit, and what would."""
        step, activation_bytes = self._step(asked)
        needed = step.blocks_per_row * self._block_bytes()
        room = max(0, self._kv_room(activation_bytes, available_bytes))
        weights = self.weights.weight_bytes + self.weights.scale_bytes
        fits = (
            f"--max-model-len {largest} is the largest that fits"
            if largest
            else "none fits; lower --max-num-seqs"
        )
        given = self.config.kv_cache_memory_bytes is not None
        return (
            f"a context of {asked} tokens needs {needed:,} bytes of KV cache, and {room:,} are "
            f"left for it beside {weights:,} of weights and {activation_bytes:,} of step buffers; "
            f"{fits} or raise {'--kv-cache-memory-bytes' if given else '--gpu-memory-utilization'}"
        )

    def _step(self, length: int) -> tuple[StepShape, int]:
        limits = self.config.limits
        step = StepShape(
            limits.max_num_batched_tokens, limits.max_num_seqs, length, limits.block_size
        )
        return step, buffer_bytes(
            plan_buffers(self.model, self.config, self.rank, step, self.weights)
        )

    def _block_bytes(self) -> int:
        config = self.config
        return kv_block_bytes(self.model, config.kv_dtype, self.rank, config.limits.block_size)

    def _kv_room(self, activation_bytes: int, available_bytes: int) -> int:
        if self.config.kv_cache_memory_bytes is not None:
            return self.config.kv_cache_memory_bytes
        budget = int(available_bytes * self.config.limits.memory_share)
        return budget - self.weights.weight_bytes - self.weights.scale_bytes - activation_bytes


def step_read_bytes(plan: ModelPlan, rank: Rank) -> int:
    """Weights and scales a decoding step reads: all but an embedding that is not also the head."""
    lookup_only = plan.embedding
    if rank.is_last_stage and plan.head is None:
        lookup_only = None  # tied: the head reads it whole
    unread = lookup_only.weight_bytes + lookup_only.scale_bytes if lookup_only else 0
    unread += sum(matrix.copy_bytes for matrix in plan.matrices())
    return plan.weight_bytes + plan.scale_bytes - unread


def usable_cores() -> int:
    """Processors this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def available_host_bytes(root: Path = Path("/")) -> int:
    """Memory this process could still take: the kernel's estimate, within its cgroups' limits."""
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable" in meminfo:
        available = 1024 * meminfo["MemAvailable"]
    else:  # not Linux
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        available = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in _CGROUPS:
                available = min(available, _cgroup_room(root, _CGROUPS[controller], path))
    return max(0, available)


_UNLIMITED = 1 << 62  # bytes
_CGROUPS = {  # controller (v2 names none): mount, and files of limit and use
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def _cgroup_room(root: Path, files: tuple[str, str, str], path: str) -> int:
    """Bytes left in a cgroup and in those around it.

    Page cache not used lately is no use of memory: the kernel drops it, and a model file just read
    would otherwise count twice.
    """
    mount, limit_file, usage_file = files
    room, top = _UNLIMITED, root / mount
    folder = top / path.lstrip("/")
    for group in (folder, *folder.parents):
        limit = "".join(_read_lines(group / limit_file))
        usage = "".join(_read_lines(group / usage_file))
        if limit.isdigit() and usage.isdigit():
            stat = _numbers(group / "memory.stat")
            cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            room = min(room, int(limit) - int(usage) + cache)
        if group == top:
            break
    return room


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file of lines `name value` or `name: value unit`."""
    fields = [line.replace(":", " ").split() for line in _read_lines(path)]
    return {f[0]: int(f[1]) for f in fields if len(f) > 1 and f[1].isdigit()}


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not this kind of system
        return []
