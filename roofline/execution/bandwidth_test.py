import json
from pathlib import Path

import pytest

from roofline.execution import bandwidth
from roofline.execution.host import cpu_fields, cpu_model


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next measurements give; each takes one."""
    values = [11.0, 22.0, 33.0]
    monkeypatch.setattr(bandwidth, "measure", lambda threads: values.pop(0))
    return values


def test_it_is_measured_once_for_a_host_and_a_number_of_threads(
    tmp_path: Path, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "absent" / "bandwidth.json"
    assert [bandwidth.read(cache, 2) for _ in range(3)] == [11.0] * 3
    assert bandwidth.read(cache, 77) == 22.0
    monkeypatch.setattr(bandwidth, "cpu_model", lambda: "another")
    assert bandwidth.read(cache, 2) == 33.0
    assert list(json.loads(cache.read_text()).values()) == [11.0, 22.0, 33.0]
    assert [path.name for path in cache.parent.iterdir()] == ["bandwidth.json"]


def test_it_can_be_measured_anew(tmp_path: Path, measured: list[float]) -> None:
    cache = tmp_path / "bandwidth.json"
    assert bandwidth.read(cache, 2) == 11.0
    assert bandwidth.read(cache, 2, anew=True) == 22.0
    assert bandwidth.read(cache, 2) == 22.0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b'{"a": "b", "c": -1}', b"[" * 100_000]
)
def test_a_damaged_file_is_replaced(content: bytes, tmp_path: Path, measured: list[float]) -> None:
    cache = tmp_path / "bandwidth.json"
    cache.write_bytes(content)
    assert bandwidth.read(cache, 2) == 11.0
    assert list(json.loads(cache.read_text()).values()) == [11.0]


def test_a_cache_that_cannot_be_written_is_done_without(measured: list[float]) -> None:
    cache = Path("/proc/roofline/bandwidth.json")
    assert [bandwidth.read(cache, 2), bandwidth.read(cache, 2)] == [11.0, 22.0]


@pytest.mark.parametrize("is_native", [True, False])
def test_a_measurement_is_a_speed_memory_can_have(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(bandwidth, "native_reader", lambda threads: None)
    assert 0 < bandwidth.measure(2, pass_bytes=1 << 24, passes=3) < 10_000


def test_in_little_memory_a_smaller_buffer_is_read_as_often_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(
        bandwidth, "native_reader", lambda threads: lambda b: sizes.append(b.nbytes)
    )
    monkeypatch.setattr(bandwidth, "available_host_bytes", lambda: 5 << 20)
    bandwidth.measure(2, pass_bytes=1 << 24, passes=3)
    assert sizes == [5 << 18] * (1 + 3 * 13)  # one to warm up


def test_the_cpu_has_a_name() -> None:
    assert cpu_model()
    assert all(isinstance(value, str) for value in cpu_fields().values())
