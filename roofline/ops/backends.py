"""The one choice of backend: native kernels where they can run the model, else the reference."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from roofline.budget import ModelPlan, is_quantized, usable_cores
from roofline.config import EngineConfig, ModelConfig
from roofline.errors import UsageError
from roofline.ops import FloatWeight, Int8Weight, Ops, Pack, Quantize, Weight, keep
from roofline.ops.cpu.library import Library, has_slow_bfloat16, open_library
from roofline.ops.cpu.native import MAX_HEAD_DIM, MAX_QUERIES, NativeOps, Pool
from roofline.ops.cpu.packing import LANES, can_pack, pack
from roofline.ops.cpu.quantizing import quantize
from roofline.ops.reference import ReferenceOps

Arena = Mapping[str, Tensor]


@dataclass(frozen=True)
class Backend:
    """What keeps the matrices of a model and computes with them."""

    name: str  # `reference`, the native ISA, or `gpu`
    reason: str | None  # why the reference stands in, if nobody asked for it
    pack: Pack
    quantize: Quantize | None  # None: torch does
    pool: Pool | None  # of the native kernels
    ops: Callable[[torch.dtype, Arena], Ops]  # working in the arena's `scratch` and `step`

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.close()


def choose(config: EngineConfig, model: ModelConfig, plan: ModelPlan) -> Backend:
    """The backend for a rank's share of a model.

    `config.device` is resolved. UsageError where an ISA was asked for that cannot run here, or
    cannot run this model.
    """
    int8_activations = config.activations == "int8"
    if config.is_on_gpu:
        return _gpu(config, model)
    if config.cpu_isa == "reference":
        return _reference(None, int8_activations)
    library = _open(config)
    reason = library if isinstance(library, str) else _unfit(config, model, plan)
    if isinstance(library, Library) and reason is None:
        pool = Pool(library, config.threads or usable_cores())
        packed = partial(_pack, library, int8_activations)
        quantized, ops = partial(quantize, pool), partial(_native_ops, pool)
        return Backend(library.isa_name, None, packed, quantized, pool, ops)
    if config.cpu_isa != "auto":
        raise UsageError(f"cpu_isa {config.cpu_isa} cannot be used: {reason}")
    return _reference(reason, int8_activations)


def survey(config: EngineConfig) -> tuple[str, str]:
    """The kernels that a model they fit would run on, and why those; UsageError as in `choose`."""
    if config.is_on_gpu:
        why = f"kernels in Triton on {torch.cuda.get_device_name(config.device)}"
        missing = importlib.import_module("roofline.ops.gpu.nvrtc").missing()
        also = ", in CUDA C++ for few tokens" if missing is None else f"; decodes slower: {missing}"
        return "gpu", why + also
    if config.cpu_isa == "reference":
        return "reference", "asked for"
    library = _open(config)
    if isinstance(library, str):
        return "reference", library
    why = "the best" if config.cpu_isa == "auto" else "the one asked for"
    if config.cpu_isa == "auto" and library.isa > 0:
        why = f"faster here than {library.isas[0]}, whose bfloat16 products are slow on this CPU;"
    return library.isa_name, f"{why} of {', '.join(library.isas)}, which this CPU runs"


def _reference(reason: str | None, int8_activations: bool) -> Backend:
    def ops(dtype: torch.dtype, arena: Arena) -> Ops:
        scratch = arena["scratch"]
        return ReferenceOps(dtype, scratch, int8_activations=int8_activations, stretches=True)

    return Backend("reference", reason, keep, None, None, ops)


def _native_ops(pool: Pool, dtype: torch.dtype, arena: Arena) -> Ops:
    return NativeOps(dtype, arena["scratch"], arena["step"], pool)


def _gpu(config: EngineConfig, model: ModelConfig) -> Backend:
    """Triton is imported here: where there is no GPU it may be missing."""
    attention, gpu_ops, layout, stream = (
        importlib.import_module(f"roofline.ops.gpu.{name}")
        for name in ("attention", "gpu_ops", "layout", "stream")
    )
    heads = attention.Heads(model.num_heads, model.num_kv_heads, model.head_dim)

    def pack(weight: Int8Weight | FloatWeight, paired: bool) -> Weight:
        return layout.pack(
            weight,
            paired,
            dtype=getattr(torch, config.dtype),
            int8_activations=config.activations == "int8",
            deterministic=config.deterministic,
        )

    def ops(dtype: torch.dtype, arena: Arena) -> Ops:
        tasks = attention.make_tasks(
            heads,
            dtype,
            getattr(torch, config.kv_dtype),
            config.limits.max_num_seqs,
            arena["scratch"].device,
            deterministic=config.deterministic,
        )
        made = gpu_ops.GpuOps(dtype, arena["scratch"], tasks, model.sliding_window)
        if config.weights.quantization == "int8" and not config.deterministic:
            kept = None if is_quantized(config.kv_dtype) else getattr(torch, config.kv_dtype)
            shares = config.tensor_parallel_size
            shapes = stream.ModelShapes(
                model.hidden_size,
                model.num_heads * model.head_dim // shares,
                model.intermediate_size // shares,
                model.head_dim,
            )
            made.compile_ahead(1 if config.activations == "int8" else 2, shapes, kept)
        return made

    return Backend("gpu", None, pack, None, None, ops)


def _open(config: EngineConfig) -> Library | str:
    if config.cpu_isa != "auto":
        return open_library(config.cpu_isa)
    library = open_library()
    if isinstance(library, str) or library.isa_name != "avx512_bf16":
        return library
    multiplies_bfloat16 = config.dtype == "bfloat16" and config.activations != "int8"
    return open_library("avx512") if multiplies_bfloat16 and has_slow_bfloat16() else library


def _pack(
    library: Library, int8_activations: bool, weight: Int8Weight | FloatWeight, paired: bool
) -> Weight:
    return pack(library, weight, paired=paired, int8_activations=int8_activations)


def _unfit(config: EngineConfig, model: ModelConfig, plan: ModelPlan) -> str | None:
    """Why the kernels cannot run a model, if so."""
    dim, shared = model.head_dim, model.num_heads // model.num_kv_heads
    if config.dtype == "float16":
        return "they compute in bfloat16 and float32, not in float16"
    if config.kv_cache_dtype != "auto":
        return f"they keep the KV cache in the activations' dtype, not in {config.kv_cache_dtype}"
    if dim % LANES or dim > MAX_HEAD_DIM:
        return f"head_dim {dim} is not a multiple of {LANES} up to {MAX_HEAD_DIM}"
    if shared > MAX_QUERIES:
        return f"{shared} query heads share a KV head; at most {MAX_QUERIES} can"
    if config.limits.block_size % LANES:
        return f"block_size {config.limits.block_size} is not a multiple of {LANES}"
    for matrix in plan.matrices():
        if not can_pack(matrix.columns, matrix.group, matrix.offset):
            return f"{matrix.name} has {matrix.columns} columns in groups of {matrix.group}"
    if any(layer.gate_up.rows % (2 * LANES) for layer in plan.layers.values()):
        return f"intermediate_size {model.intermediate_size} is not a multiple of {LANES}"
    return None
