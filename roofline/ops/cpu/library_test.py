"""A library that is missing, stale, damaged or of another machine is one clear line."""

import shutil
import subprocess
from pathlib import Path

import pytest

from roofline.errors import UsageError
from roofline.ops.cpu import abi, library
from tests.native_library import open_native

COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library is looked for, and nowhere else."""
    path = tmp_path / "libroofline_native.so"
    monkeypatch.setattr(library, "_candidates", lambda: iter([path]))
    return path


def reason() -> str:
    """Why there is no library, in one line."""
    found = library.open_library()
    assert isinstance(found, str) and "\n" not in found
    return found


def compile_stub(path: Path, version: int) -> None:
    code = f'extern "C" int roofline_abi_version() {{ return {version}; }}'
    command = [str(COMPILER), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=code, text=True, check=True)


def test_a_missing_library_says_how_to_get_one(place: Path) -> None:
    assert reason() == (
        "the native kernels are not built: install a C++ compiler (Debian: apt install g++) "
        "and Roofline again"
    )


def test_a_file_that_is_no_library_is_told(place: Path) -> None:
    place.write_text("not a library")
    assert reason().startswith(f"{place} cannot be opened: ")
    assert reason().endswith("; install Roofline again")


@needs_compiler
def test_a_library_of_another_version_is_refused(place: Path) -> None:
    compile_stub(place, abi.VERSION + 1)
    told = f"{place} has ABI {abi.VERSION + 1}, not {abi.VERSION}; install Roofline again"
    assert reason() == told


@needs_compiler
def test_a_library_without_our_functions_is_refused(place: Path) -> None:
    compile_stub(place, abi.VERSION)
    assert "cannot be opened" in reason() and "roofline_isa" in reason()


def test_a_good_library_behind_a_bad_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = open_native().path, tmp_path / "libroofline_native.so"
    bad.write_text("not a library")
    monkeypatch.setattr(library, "_candidates", lambda: iter([bad, good]))
    found = library.open_library()
    assert isinstance(found, library.Library) and found.path == good


def test_an_isa_this_machine_has_not_is_refused_with_those_it_has() -> None:
    opened = open_native()
    with pytest.raises(UsageError, match=r"cpu_isa is 'z80', .* here: .*portable$"):
        library.open_library("z80")
    assert opened.isa == 0 and opened.isas[-1] == "portable"
    for isa in opened.isas:
        assert open_native(isa).isa_name == isa
