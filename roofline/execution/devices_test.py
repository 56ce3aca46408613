"""Which device is chosen, with PyTorch's own answers replaced: there need be no GPU here."""

import importlib.util
from typing import Any

import pytest
import torch

from roofline.config import EngineConfig
from roofline.errors import RooflineError
from roofline.execution import devices


def machine(
    monkeypatch: pytest.MonkeyPatch,
    cards: list[tuple[int, int]],
    *,
    triton: bool = True,
    driver: bool = False,
) -> None:
    """Cards of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: cards[number])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    found = importlib.util.find_spec("json") if triton else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(devices, "_DRIVER", devices.Path("/" if driver else "/no/such/driver"))


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({}, "cuda:0"),
        ({"device": "cuda"}, "cuda:0"),
        ({"device": "cuda:1"}, "cuda:1"),
        ({"device": "cpu"}, "cpu"),
        ({"cpu_isa": "reference"}, "cpu"),
    ],
    ids=str,
)
def test_a_gpu_is_used_unless_the_cpu_is_asked_for(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, [(9, 0), (8, 0)])
    config, unused = devices.resolve(EngineConfig(**options))
    assert (config.device, unused) == (device, None)


def test_without_a_gpu_the_cpu_is_no_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, [])
    assert devices.resolve(EngineConfig()) == (EngineConfig(device="cpu"), None)


@pytest.mark.parametrize(
    ("here", "options", "why"),
    [
        ({"cards": [(7, 5)]}, {}, "cuda:0 is a Card 0 of compute capability 7.5; 8.0 and later"),
        ({"cards": [(9, 0)], "triton": False}, {}, "needs triton, which is not installed"),
        ({"cards": [], "driver": True}, {}, "cuda:0 cannot be used"),
        ({"cards": [(8, 0)]}, {"kv_cache_dtype": "fp8"}, "fp8 needs compute capability 8.9"),
    ],
    ids=str,
)
def test_a_gpu_that_cannot_be_used_is_refused_by_name_or_its_reason_told(
    here: dict[str, Any],
    options: dict[str, Any],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, **here)
    config, unused = devices.resolve(EngineConfig(**options))
    assert config.device == "cpu" and unused is not None and why in unused
    with pytest.raises(RooflineError, match=why.partition(";")[0]):
        devices.resolve(EngineConfig(device="cuda", **options))


def test_a_number_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, [(9, 0)])
    with pytest.raises(RooflineError, match="device cuda:4 is not here; the last is cuda:0"):
        devices.resolve(EngineConfig(device="cuda:4"))
