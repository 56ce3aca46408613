"""`roofline doctor`: what this machine has, what looks wrong and what to do about it.

It says something useful where nothing else works: torch may be absent or broken.
"""

import contextlib
import dataclasses
import difflib
import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

import roofline
from roofline import execution, models
from roofline.budget import available_host_bytes, usable_cores
from roofline.cli import figures, options, output
from roofline.config import EngineConfig, environment_options
from roofline.errors import RooflineError

# Flags of /proc/cpuinfo that decide how fast INT8 and bfloat16 can be.
_SIMD_X86 = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_SIMD_ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve")
_OTHER_VARIABLES = tuple(
    f"ROOFLINE_{name}" for name in ("CACHE", "DEBUG", "TEST_DATA", "TEST_GGUF", "REQUIRE_NATIVE")
)
_THREAD_FACTS = ("threads", "kernel_threads")  # of torch, and of our own kernels
_LITTLE_MEMORY = 2_000_000_000  # bytes


def doctor(*, json: options.Json = False) -> None:
    """Look this machine over and say what is wrong; measures read bandwidth anew."""
    torch, broken = _import_torch()
    facts = _versions() | _machine() | _cache()
    if torch is not None:
        kernels, missing = _kernels(importlib.import_module("roofline.ops.backends"))
        facts |= _torch_facts(torch) | kernels
        facts["bandwidth_gb_s"] = figures.bandwidth_gb_s(facts["kernel_threads"], anew=True)
        broken += missing
    facts["variables"] = {k: v for k, v in os.environ.items() if k.startswith("ROOFLINE_")}
    problems = [*broken, *_problems(facts)]
    if json:
        output.print_json(facts | {"problems": problems})
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for name, value in facts.items():
        console.print(f"{name.replace('_', ' '):20} {_shown(value)}")
    for problem in problems or ["nothing looks wrong"]:
        console.print(f"{'PROBLEM' if problems else 'verdict':20} {problem}")


def _import_torch() -> tuple[ModuleType | None, list[str]]:
    """Torch, or what is wrong with it."""
    try:
        return importlib.import_module("torch"), []
    except (ImportError, OSError) as error:  # OSError: a shared library it needs is missing
        reason = " ".join(str(error).split())
        return None, [f"torch cannot be imported ({reason}); install it again: pip install torch"]


def _versions() -> dict[str, Any]:
    return {
        "roofline": roofline.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _machine() -> dict[str, Any]:
    flags = execution.host.cpu_fields()
    present = flags.get("flags", flags.get("Features", "")).split()
    return {
        "cpu": execution.host.cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "simd": [flag for flag in (*_SIMD_X86, *_SIMD_ARM) if flag in present],
        "available_memory_bytes": available_host_bytes(),
        "nvidia_driver": shutil.which("nvidia-smi") is not None,
    }


def _cache() -> dict[str, Any]:
    folder = models.builtin.cache_folder()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return {"cache_folder": str(folder), "cached_files": found}


def _torch_facts(torch: ModuleType) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _kernels(backends: ModuleType) -> tuple[dict[str, Any], list[str]]:
    """Which kernels a model would run on, why and on how many threads; what keeps better away."""
    config, unused = EngineConfig(), None
    with contextlib.suppress(RooflineError):  # told among the problems
        config = EngineConfig(**environment_options(os.environ))
    try:
        config, unused = execution.devices.resolve(config)
        name, why = backends.survey(config)
    except RooflineError as error:
        name, why = "none", error.message
    threads = config.threads or usable_cores()
    facts = {
        "device": config.device,
        "kernels": name,
        "kernels_why": why,
        "kernel_threads": threads,
    }
    stands_in = name == "none" or (name == "reference" and config.cpu_isa != "reference")
    reasons = [f"the CPU runs models, not the GPU: {unused}"] if unused else []
    return facts, [*reasons, why] if stands_in else reasons


def _problems(facts: Mapping[str, Any]) -> Iterator[str]:
    """What looks wrong, each with what to do."""
    yield from _variable_problems(facts["variables"])
    if facts["available_memory_bytes"] < _LITTLE_MEMORY:
        free = facts["available_memory_bytes"] / 1e9
        yield f"only {free:.1f} GB of memory are free; `roofline fit MODEL` says what a model needs"
    threads, cores = max(facts.get(f, 1) for f in _THREAD_FACTS), facts["usable_cores"]
    if threads > cores:
        yield f"{threads} threads run on {cores} usable cores; set ROOFLINE_THREADS={cores}"
    folder = facts["cache_folder"]
    if not _is_writable(Path(folder)):
        yield f"{folder} cannot be written; set ROOFLINE_CACHE to a folder that can"
    for model in models.builtin.BUILTIN_MODELS.values():
        size = facts["cached_files"].get(f"models/{model.name}.gguf", model.size_bytes)
        if size != model.size_bytes:
            yield f"the cached {model.name} has {size} bytes, not {model.size_bytes}; delete it"


def _is_writable(folder: Path) -> bool:
    """Whether a file can be made in the folder, or in the nearest above it that exists."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return True
    except OSError:
        return False


def _variable_problems(variables: Mapping[str, str]) -> Iterator[str]:
    names = [f"ROOFLINE_{field.name.upper()}" for field in dataclasses.fields(EngineConfig)]
    for variable in variables:
        if variable not in (*names, *_OTHER_VARIABLES):
            near = difflib.get_close_matches(variable, (*names, *_OTHER_VARIABLES), 1)
            yield f"{variable} means nothing" + (f"; did you mean {near[0]}?" if near else "")
    try:
        EngineConfig(**environment_options(variables))
    except RooflineError as error:
        yield error.message


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={content}" for name, content in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(value) or "none"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
