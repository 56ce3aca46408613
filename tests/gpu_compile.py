"""Compile Triton kernels for a GPU that is not there, and read what they take of it.

Only in a process without the interpreter: a test runs its compilations in a child. Launchers are
recorded on tensors without memory, so what is compiled is what a launch would compile.
"""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALIGNED = [["tt.divisibility", 16]]  # what a launch finds in pointers of tensors and such integers
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8", torch.int16: "i16",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes, and its PTX."""

    name: str
    registers: int  # of a thread
    spilled_bytes: int  # of a thread, and other local memory
    shared_bytes: int  # of a program
    ptx: str


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any
    arguments: dict[str, Any]  # of the kernel, by name
    options: dict[str, int | None]

    def compile(self, capability: int) -> Compiled:
        """Compile for sm_80, sm_90, as Triton would for these arguments."""
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        general = [self.kernel.arg_names[p.num] for p in self.kernel.params if p.do_not_specialize]
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            is_one = isinstance(value, int) and value == 1 and name not in general
            if parameter.is_constexpr or value is None or is_one:
                constants[name] = value
            else:
                types[name] = _type_of(value, name not in general)
        constants["PDL"] = capability >= 90
        return compile_kernel(self.kernel, types, constants, capability, **self.options)


def recorded(run: Callable[[], object], launcher_modules: list[Any]) -> list[Launch]:
    """The launches that `run` makes through `triton_support.launch` in some modules."""
    found: list[Launch] = []

    def record(
        kernel: Any, grid: tuple[int, ...], pdl: bool, *arguments: object, **options: Any
    ) -> None:
        kept = {name: options.pop(name) for name in OPTIONS if name in options}
        bound = inspect.signature(kernel.fn).bind(*arguments, **options, PDL=pdl)
        found.append(Launch(kernel, dict(bound.arguments), kept))

    before = [module.launch for module in launcher_modules]
    try:
        for module in launcher_modules:
            module.launch = record
        run()
    finally:
        for module, launch in zip(launcher_modules, before, strict=True):
            module.launch = launch
    return found


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],  # of arguments, such as "*fp32", "i32"; "i32:16" if divisible by 16
    constants: Mapping[str, Any],  # constexprs, and arguments that are None or 1
    capability: int,
    **options: Any,  # num_warps, num_stages
) -> Compiled:
    """Compile one kernel as a launch with such arguments would."""
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    signature = {n: "constexpr" if n in constants else types[n].split(":")[0] for n in names}
    aligned = [n for n in types if types[n].startswith("*") or types[n].endswith(":16")]
    attributes = {(names.index(name),): ALIGNED for name in aligned}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    if capability >= 90:
        options.setdefault("launch_pdl", bool(constants.get("PDL")))
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = _resources(made.asm["cubin"])
    return Compiled(kernel.__name__, *used, made.metadata.shared, made.asm["ptx"])


def _type_of(value: object, specialized: bool) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    return f"{width}:16" if specialized and value % 16 == 0 else width


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
