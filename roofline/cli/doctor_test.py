import json
from pathlib import Path
from typing import Any

import pytest

from roofline.cli import doctor, figures
from roofline.models import builtin
from roofline.ops.cpu import library
from tests.native_library import open_native


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No measuring, an empty cache, and none of the caller's variables."""
    monkeypatch.setattr(figures, "bandwidth_gb_s", lambda threads, *, anew: 20.0 if anew else 0.0)
    for name in [name for name in doctor.os.environ if name.startswith("ROOFLINE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ROOFLINE_CACHE", str(tmp_path / "cache"))


def examine(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    doctor.doctor(json=True)
    return json.loads(capsys.readouterr().out)


def test_it_tells_what_the_machine_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = examine(capsys)
    for name in ("roofline", "python", "torch", "cpu", "cores", "available_memory_bytes"):
        assert report[name], name
    assert report["bandwidth_gb_s"] == 20.0
    assert report["cache_folder"] == str(tmp_path / "cache")
    assert report["variables"] == {"ROOFLINE_CACHE": str(tmp_path / "cache")}


def test_a_person_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor()
    out = capsys.readouterr().out
    assert "cpu " in out and "bandwidth gb s" in out


def test_it_tells_which_kernels_run_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    isas = open_native().isas
    monkeypatch.setattr(library, "_CPU_INFO", Path("/proc/none"))
    report = examine(capsys)
    assert report["kernels"] == isas[0]
    assert report["kernels_why"] == f"the best of {', '.join(isas)}, which this CPU runs"
    assert report["kernel_threads"] == report["usable_cores"]
    monkeypatch.setenv("ROOFLINE_CPU_ISA", "portable")
    monkeypatch.setenv("ROOFLINE_THREADS", "1000")
    report = examine(capsys)
    assert report["kernels"] == "portable" and report["kernels_why"].startswith(
        "the one asked for of "
    )
    assert any(problem.startswith("1000 threads run on ") for problem in report["problems"])


def test_it_tells_that_the_kernels_are_missing_and_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "_candidates", lambda: iter(()))
    report = examine(capsys)
    assert report["kernels"] == "reference"
    missing = [p for p in report["problems"] if "native kernels are not built" in p]
    assert len(missing) == 1 and "apt install g++" in missing[0] and "\n" not in missing[0]
    monkeypatch.setenv("ROOFLINE_CPU_ISA", "reference")
    report = examine(capsys)
    assert (report["kernels"], report["kernels_why"]) == ("reference", "asked for")
    assert not any("native" in problem for problem in report["problems"])


def test_kernels_that_this_cpu_lacks_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_native()
    monkeypatch.setattr(library, "_isas", lambda functions: iter(["portable"]))
    monkeypatch.setenv("ROOFLINE_CPU_ISA", "avx2")
    report = examine(capsys)
    assert report["kernels"] == "none"
    assert any("cpu_isa is 'avx2'" in problem for problem in report["problems"])


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("ROOFLINE_THREDS", "4", "ROOFLINE_THREDS means nothing; did you mean ROOFLINE_THREADS?"),
        (
            "ROOFLINE_DTYPE",
            "f16",
            "ROOFLINE_DTYPE is 'f16'; it must be 'bfloat16' or 'float16' or 'float32'",
        ),
        ("ROOFLINE_CACHE", "/proc/cache", "/proc/cache cannot be written; set ROOFLINE_CACHE"),
    ],
)
def test_what_is_wrong_with_variables_is_told(
    variable: str,
    value: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert any(found.startswith(problem) for found in examine(capsys)["problems"])
    doctor.doctor()
    assert problem in capsys.readouterr().out


def test_a_damaged_model_in_the_cache_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(builtin.BUILTIN_MODELS))
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True)
    (folder / f"{name}.gguf").write_bytes(b"half")
    report = examine(capsys)
    assert report["cached_files"] == {f"models/{name}.gguf": 4}
    assert any(f"the cached {name} has 4 bytes" in problem for problem in report["problems"])


def test_a_broken_torch_is_a_problem_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    report = examine(capsys)
    assert any("torch cannot be imported (libgomp.so.1" in p for p in report["problems"])
    assert "threads" not in report and report["cpu"]


def test_little_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "available_host_bytes", lambda: 10**9)
    assert any("only 1.0 GB of memory" in problem for problem in examine(capsys)["problems"])
