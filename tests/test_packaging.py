"""The wheel: what is in it, and that it can be built where nothing can be compiled."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import roofline

ROOT = Path(__file__).parents[1]
LIBRARY = re.compile(r"roofline/ops/(lib)?roofline_native\.(so|dylib|dll)")

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def build_wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    """Build from nothing with the tools of this machine, none downloaded, without optimising."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    fresh = {"SKBUILD_BUILD_DIR": str(folder / "build"), "SKBUILD_CMAKE_BUILD_TYPE": "Debug"}
    subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)],
        env={**os.environ, **fresh, **environment},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = folder.glob(f"roofline-{roofline.__version__}-*.whl")
    return zipfile.ZipFile(wheel)


def found_library(installed: str, folder: Path) -> str:
    """What an installation says of its native library."""
    code = (
        f"import sys; sys.path.insert(0, {installed!r});"
        # Python's own finders are classes; that of an editable install is not, and goes first.
        "sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)];"
        "from roofline.ops.cpu import library; print(library.open_library())"
    )
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@needs_cmake
@needs_compiler
def test_wheel_holds_the_native_library_which_opens_and_no_tests(tmp_path: Path) -> None:
    with build_wheel(tmp_path) as wheel:
        names = wheel.namelist()
        assert "-py3-none-" in str(wheel.filename)
        wheel.extractall(tmp_path / "installed")
    assert [name for name in names if LIBRARY.fullmatch(name)]
    assert {"roofline/__init__.py", "roofline/py.typed"} < set(names)
    assert [name for name in names if name.endswith(("_test.py", ".cpp", ".h"))] == []
    found = found_library(str(tmp_path / "installed"), tmp_path)
    assert found.startswith("Library(") and str(tmp_path / "installed") in found


@pytest.mark.parametrize(
    "missing", [pytest.param("compiler", marks=needs_cmake), pytest.param("cmake")]
)
def test_failed_native_build_still_gives_a_working_wheel(missing: str, tmp_path: Path) -> None:
    broken = {"compiler": {"CXX": "/bin/false"}, "cmake": {"PATH": str(tmp_path)}}
    with build_wheel(tmp_path, **broken[missing]) as wheel:
        assert not any(LIBRARY.fullmatch(name) for name in wheel.namelist())
        found = found_library(str(wheel.filename), tmp_path)
    assert found.startswith("the native kernels are not built: install a C++ compiler")


def test_every_dependency_has_its_reason_and_there_are_at_most_14() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    names = [re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]]
    assert len(names) <= 14
    assert [name for name in names if f"| `{name}`" not in reasons] == []
