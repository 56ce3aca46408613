"""CUDA C++ kernels, for what Triton measurably loses: compiled by NVRTC, which PyTorch brings.

A kernel is compiled for one set of macros and one card, in about a second, and its machine code
is kept in Triton's cache folder, so that the next process loads it in a millisecond.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from torch import Tensor

from roofline.errors import UnsupportedError

Macros = tuple[tuple[str, int], ...]  # in order of their names

_OPTIONS = ("--std=c++17", "-default-device")
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_PREFERRED_SHARED_PERCENT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: 64 bytes of value, of which three integers are used."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4),
                ("value", ctypes.c_uint * 3), ("rest", ctypes.c_char * 52))  # fmt: skip


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
                ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint))  # fmt: skip


class Kernel:
    """A kernel on one device, ready to be launched on its current stream."""

    def __init__(self, code: bytes, name: str) -> None:
        self._driver = _driver()
        module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code))
        self._check(
            self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
        )
        self._shared_bytes = 0  # of a block, at most, so far
        # As much shared memory as there is: the next kernel's blocks may be beside this one's.
        self._check(self._driver.cuFuncSetAttribute(self._function, _PREFERRED_SHARED_PERCENT, 100))

    def launch(
        self,
        grid: int,
        threads: int,
        shared_bytes: int,
        pdl: bool,
        *arguments: Tensor | int | None,  # int: 32 bits
        cluster: int = 1,  # blocks that share their memory; the grid is a multiple of it
    ) -> None:
        """Launch it; with PDL it may start before the kernel before it has ended."""
        self._allow(shared_bytes)
        values = [
            ctypes.c_int(a)
            if isinstance(a, int)
            else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        ]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        attributes = (_Attribute * 2)()
        attributes[0] = _Attribute(_CLUSTER_DIMENSION, b"", (cluster, 1, 1), b"")
        attributes[1] = _Attribute(_PROGRAMMATIC_SERIALIZATION, b"", (1, 0, 0), b"")
        asked = attributes if cluster > 1 else ctypes.pointer(attributes[1])
        config = _LaunchConfig(
            (grid, 1, 1), (threads, 1, 1), shared_bytes, torch.cuda.current_stream().cuda_stream,
            ctypes.cast(asked, ctypes.POINTER(_Attribute)), int(cluster > 1) + int(pdl),
        )  # fmt: skip
        self._check(
            self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, places, None)
        )

    def clusters(self, size: int, threads: int, shared_bytes: int) -> int:
        """How many clusters of so many blocks the device can have at once."""
        self._allow(shared_bytes)
        attribute = _Attribute(_CLUSTER_DIMENSION, b"", (size, 1, 1), b"")
        config = _LaunchConfig(
            (size, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(attribute), 1
        )
        count = ctypes.c_int()
        self._check(
            self._driver.cuOccupancyMaxActiveClusters(
                ctypes.byref(count), self._function, ctypes.byref(config)
            )
        )
        return count.value

    def _allow(self, shared_bytes: int) -> None:
        if shared_bytes > self._shared_bytes:
            self._check(
                self._driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes)
            )
            self._shared_bytes = shared_bytes

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}")


class Variants:
    """A .cu file on one device: each set of macros compiled when first needed, or ahead.

    `own`: whether it uses what one architecture alone has (sm_90a), and not those after it.
    """

    def __init__(self, source: Path, device: torch.device, *, own: bool = False) -> None:
        self._source, self._device, self._own = source, device, own
        self._coming: dict[Macros, Future[bytes]] = {}
        self._kernels: dict[Macros, Kernel] = {}

    def compile_ahead(self, wanted: set[Macros]) -> None:
        """Compile side by side what will be needed."""
        pool = ThreadPoolExecutor(thread_name_prefix="nvrtc")
        self._coming |= {macros: pool.submit(self._compile, macros) for macros in wanted}
        pool.shutdown(wait=False)  # its threads end with their work

    def kernel(self, macros: Macros) -> Kernel:
        """A variant: the function that is named as its file is."""
        if macros not in self._kernels:
            coming = self._coming.pop(macros, None)
            code = self._compile(macros) if coming is None else coming.result()
            self._kernels[macros] = Kernel(code, self._source.stem)
        return self._kernels[macros]

    def _compile(self, macros: Macros) -> bytes:
        return code_of(self._source, dict(macros), self._device, own=self._own)


def code_of(
    source: Path, macros: Mapping[str, int], device: torch.device, *, own: bool = False
) -> bytes:
    """The machine code of a .cu file for a device, compiled or as it was kept; see `Variants`."""
    text = source.read_bytes()
    capability = "{}{}".format(*torch.cuda.get_device_capability(device)) + "a" * own
    options = [f"--gpu-architecture=sm_{capability}", *_OPTIONS]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    key = hashlib.sha256(b"\0".join([text, *(o.encode() for o in options)])).hexdigest()
    kept = Path(triton.knobs.cache.dir) / f"roofline-{source.stem}-{key[:40]}.cubin"
    if kept.exists():
        return kept.read_bytes()
    code = machine_code(text, source.name, options)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(code)
    Path(file.name).replace(kept)  # whole or not at all
    return code


def machine_code(source: bytes, name: str, options: list[str]) -> bytes:
    """Compile CUDA C++; RuntimeError with the compiler's words where it does not."""
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{name} does not compile: {log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def missing() -> str | None:
    """Why there is no compiler here, and what to do; None where there is one."""
    try:
        _nvrtc()
    except UnsupportedError as error:
        return error.message
    return None


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library; UnsupportedError where it is not."""
    for name in _nvrtc_names():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise UnsupportedError("NVRTC, which PyTorch brings, is missing; pip install nvidia-cuda-nvrtc")


def _nvrtc_names() -> Iterator[str]:
    """Where it may be: on the loader's path, in NVIDIA's packages, in a CUDA toolkit."""
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    yield name
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from map(str, sorted(Path(folder).rglob(name)))
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    yield str(toolkit / "lib64" / name)
