"""Which device a model runs on: a GPU that our kernels know, or the CPU, and why not the other."""

import dataclasses
import importlib.util
from pathlib import Path

import torch

from roofline.config import EngineConfig
from roofline.errors import RooflineError, UnsupportedError, UsageError

OLDEST = (8, 0)  # compute capability
OLDEST_FP8 = (8, 9)
_DRIVER = Path("/proc/driver/nvidia/version")  # there is a GPU here, whatever PyTorch sees


def resolve(config: EngineConfig) -> tuple[EngineConfig, str | None]:
    """The config with `device` as cpu or cuda:N; and why a GPU that is here goes unused, if so.

    UsageError or UnsupportedError where a GPU was asked for that is not there or cannot be used.
    """
    if config.device == "cpu":
        return config, None
    if config.device == "auto":
        if config.cpu_isa != "auto":  # asks for kernels of the CPU
            return dataclasses.replace(config, device="cpu"), None
        try:
            return _on_gpu(config, 0), None
        except RooflineError as error:
            reason = error.message if torch.cuda.is_available() or _DRIVER.exists() else None
            return dataclasses.replace(config, device="cpu"), reason
    _, _, number = config.device.partition(":")
    return _on_gpu(config, int(number or 0)), None


def _on_gpu(config: EngineConfig, number: int) -> EngineConfig:
    """The config on GPU `number`, or an error that says why not."""
    name = f"device cuda:{number}"
    if not torch.cuda.is_available():
        lack = "this PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise UsageError(f"{name} cannot be used: {lack} (torch {torch.__version__}); use cpu")
    count = torch.cuda.device_count()
    if number >= count:
        raise UsageError(f"{name} is not here; the last is cuda:{count - 1}")
    capability = torch.cuda.get_device_capability(number)
    card, has = torch.cuda.get_device_name(number), "{}.{}".format(*capability)
    if capability < OLDEST:
        raise UnsupportedError(
            f"{name} is a {card} of compute capability {has}; 8.0 and later run; use device cpu"
        )
    if importlib.util.find_spec("triton") is None:
        raise UsageError(f"{name} needs triton, which is not installed; pip install triton")
    if config.kv_cache_dtype == "fp8" and capability < OLDEST_FP8:
        raise UnsupportedError(
            f"kv_cache_dtype fp8 needs compute capability 8.9, and {name}, a {card}, has {has}; "
            "int8 runs there"
        )
    return dataclasses.replace(config, device=f"cuda:{number}")
