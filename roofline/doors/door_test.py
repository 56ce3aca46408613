"""What both doors share, seen through the door itself: nothing here drives the engine."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from roofline import LLM, AsyncLLM
from roofline.config import EngineConfig
from roofline.doors.door import Door
from roofline.errors import RequestError, UsageError
from roofline.request import SamplingParams
from tests.tiny_model import CONTEXT, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def door(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), kv_cache_memory_bytes=40_000) as opened:
        yield opened


def test_a_model_is_named_by_text() -> None:
    wrong: list[object] = [None, 5, Path("model")]
    for model in wrong:
        with pytest.raises(UsageError, match="must be a name or a path, as text"):
            Door.from_config(model, EngineConfig())  # pyrefly: ignore[bad-argument-type]


def test_both_doors_take_the_same_request(door: LLM) -> None:
    one, other = (inspect.signature(kind.chat).parameters for kind in (LLM, AsyncLLM))
    assert one["options"].annotation == other["options"].annotation
    shared = {"max_model_len", "get_tokenizer", "default_sampling_params", "stats", "from_config"}
    assert shared <= set(dir(Door)) and not shared & (vars(LLM).keys() | vars(AsyncLLM).keys())
    assert door.default_sampling_params() == SamplingParams()


def test_a_request_that_could_outgrow_the_pool_is_refused_before_the_engine(door: LLM) -> None:
    largest = door.max_model_len
    assert largest < CONTEXT
    with pytest.raises(RequestError, match=f"max_model_len is {largest}"):
        door.generate([[7] * largest])
    assert door.stats()["num_requests"] == 0
