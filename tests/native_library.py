"""The native library for tests: skipped by name where there is none, unless it is required."""

import os

import pytest

from roofline.errors import UsageError
from roofline.ops.cpu.library import Library, open_library

ISAS = "amx", "avx512_bf16", "avx512", "avx2", "portable"
REQUIRED = os.environ.get("ROOFLINE_REQUIRE_NATIVE") == "1"  # a missing library fails the tests


def open_native(isa: str | None = None) -> Library:
    """The library with an ISA; the test is skipped where the library or the CPU has it not."""
    library = open_library()
    if isinstance(library, str):
        if REQUIRED:
            pytest.fail(f"ROOFLINE_REQUIRE_NATIVE=1: {library}")
        pytest.skip(library)
    try:
        chosen = open_library(isa)
    except UsageError as error:
        pytest.skip(error.message)
    assert isinstance(chosen, Library)
    return chosen
