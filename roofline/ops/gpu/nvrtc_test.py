"""Where the compiler is looked for, that what it makes is kept, and that plans fit their cards."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from roofline.ops.gpu import nvrtc
from roofline.ops.gpu.stream import plan_stream

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason="no NVRTC")
SOURCE = Path(nvrtc.__file__).with_name("stream.cu")


def test_without_the_compiler_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_nvrtc_names", lambda: iter(("libnvrtc.so.none",)))
    nvrtc._nvrtc.cache_clear()
    reason = nvrtc.missing()
    nvrtc._nvrtc.cache_clear()
    assert reason is not None and "pip install nvidia-cuda-nvrtc" in reason


@needs_nvrtc
def test_an_error_of_the_compiler_is_told_in_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile: .*undefined"):
        nvrtc.machine_code(b"int f() { return missing; }", "broken.cu", ["-default-device"])


@needs_nvrtc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_machine_code_is_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc.triton.knobs.cache, "dir", str(tmp_path))
    source = tmp_path / "empty.cu"
    source.write_text('extern "C" __global__ void empty() {}')
    first = nvrtc.code_of(source, {"X": 1}, torch.device("cuda"))
    (kept,) = tmp_path.glob("*.cubin")
    monkeypatch.setattr(nvrtc, "machine_code", None)
    assert nvrtc.code_of(source, {"X": 1}, torch.device("cuda")) == first == kept.read_bytes()


@pytest.mark.parametrize("most_shared", [232_448, 166_912, 101_376], ids=["H100", "A100", "A10"])
@pytest.mark.parametrize("columns", [64, 576, 768, 4096, 5120, 8192, 11008, 14336, 18944, 28672])
@pytest.mark.parametrize("planes", [1, 2])
def test_every_plan_fits_its_card(columns: int, planes: int, most_shared: int) -> None:
    for tokens in range(1, 17):
        for given in {0, 1} if tokens == 1 and planes == 2 else {0}:
            plan = plan_stream(tokens, planes, columns, given, most_shared)
            steps = -(-columns // 128)
            own = -(-steps // plan.warps)
            assert plan.shared_bytes(tokens) <= most_shared
            assert own % plan.depth == 0 and plan.warps * own >= steps
            assert plan.token_tiles * 8 >= tokens * planes and plan.grid(1000, 132) <= 264
