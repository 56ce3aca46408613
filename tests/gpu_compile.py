"""Compile Triton kernels for a GPU that is not there, and read what they take of it.

Only in a process without the interpreter: a test runs its compilations in a child.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALIGNED = [["tt.divisibility", 16]]  # what a launch finds in pointers of tensors and such integers


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes, and its PTX."""

    registers: int  # of a thread
    spilled_bytes: int  # of a thread, and other local memory
    shared_bytes: int  # of a program
    ptx: str


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],  # of arguments, such as "*fp32", "i32"; "i32:16" if divisible by 16
    constants: Mapping[str, Any],  # constexprs, and arguments that are None or 1
    capability: int,  # 80, 90
    **options: Any,  # num_warps, num_stages
) -> Compiled:
    """Compile one kernel as a launch with such arguments would."""
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    signature = {n: "constexpr" if n in constants else types[n].split(":")[0] for n in names}
    aligned = [n for n in types if types[n].startswith("*") or types[n].endswith(":16")]
    attributes = {(names.index(name),): ALIGNED for name in aligned}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    target = GPUTarget("cuda", capability, 32)
    if capability >= 90:
        options.setdefault("launch_pdl", bool(constants.get("PDL")))
    made = triton.compile(source, target=target, options=options)
    return Compiled(*_resources(made.asm["cubin"]), made.metadata.shared, made.asm["ptx"])


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
