"""The asynchronous door: many streams at once, ended at any moment in every way a reader can."""

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from roofline import LLM, AsyncLLM, SamplingParams
from roofline.doors.outputs import RequestOutput
from roofline.errors import EngineError, RequestError, UsageError
from roofline.execution.runner import ModelRunner
from tests.tiny_model import CONTEXT, write_tiny_model

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG_ENOUGH = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Iterator[AsyncLLM]:
    door = AsyncLLM(str(folder), **OPTIONS)
    yield door
    door.close()


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps so slow that no LONG answer ends by itself, however late this thread is."""
    step = ModelRunner.run

    def slow_step(*plan: Any) -> Any:
        time.sleep(0.02)
        return step(*plan)

    monkeypatch.setattr(ModelRunner, "run", slow_step)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run to the end in an event loop of its own; what the loop would only log is a failure."""
    unheard: list[dict[str, Any]] = []

    async def whole() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: unheard.append(about))
        await main()
        gc.collect()

    asyncio.run(whole())
    assert unheard == []


async def last(stream: Any) -> RequestOutput:
    """Read a stream to its end."""
    return [output async for output in stream][-1]


async def settled(door: AsyncLLM) -> dict[str, int]:
    """Wait until nothing is left alive in the engine; that it comes to that is what is tested."""
    busy = ("num_running", "num_waiting", "num_used_blocks")
    give_up = time.monotonic() + 20
    while any(door.stats()[name] for name in busy):
        assert time.monotonic() < give_up, door.stats()
        await asyncio.sleep(0.001)
    return door.stats()


def requests(seed: int, count: int) -> list[tuple[str, SamplingParams]]:
    """Prompts of several lengths, some of which begin alike, sampled with seeds of their own."""
    chance = random.Random(seed)
    shared = "a beginning that some prompts share, of a few blocks "
    return [
        (
            chance.choice(("", shared)) + f"{index} " * chance.randint(1, 20),
            SamplingParams(
                n=chance.choice((1, 1, 1, 2)),
                seed=chance.randrange(1 << 32),
                max_tokens=chance.randint(1, 40),
            ),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_of_64_streams_ended_at_random_those_that_stay_are_right_and_no_block_leaks(
    llm: LLM, loaded: AsyncLLM, seed: int
) -> None:
    asked = requests(seed, 64)
    expected = llm.generate([text for text, _ in asked], [params for _, params in asked])
    chance = random.Random(seed)

    async def leave_after(stream: Any, count: int, how: str) -> None:
        async for _ in stream:
            count -= 1
            if count <= 0 and how == "raise":
                raise ZeroDivisionError
            if count <= 0:
                break
        if how == "close":
            await stream.aclose()

    async def one(index: int) -> None:
        stream = loaded.generate(*asked[index])
        end = chance.choice(("stay", "stay", "cancel", "close", "raise", "forget"))
        if end == "stay":
            assert (await last(stream)).outputs == expected[index].outputs
        elif end == "cancel":
            reading = asyncio.create_task(last(stream))
            await asyncio.sleep(chance.choice((0, 0.001, chance.random() / 5)))
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        elif end == "raise":
            with pytest.raises(ZeroDivisionError):  # at the first: there may be no second
                await leave_after(stream, 1, end)
        else:
            await leave_after(stream, chance.randint(0, 20), end)

    async def main() -> None:
        await asyncio.gather(*map(one, range(len(asked))))
        await settled(loaded)

    run(main)


def test_streams_grow_to_what_generate_and_chat_answer(llm: LLM, loaded: AsyncLLM) -> None:
    messages = [{"role": "user", "content": "hello"}]

    async def main() -> None:
        stream = loaded.generate("abc", GREEDY)
        lengths = [len(output.outputs[0].token_ids) async for output in stream]
        assert lengths == sorted(set(lengths)) and lengths[-1] == 12
        assert (await last(loaded.generate("abc", GREEDY))).outputs == (
            llm.generate("abc", GREEDY)[0].outputs
        )
        answer = await last(loaded.chat(messages, GREEDY))
        expected = llm.chat(messages, GREEDY)[0]
        assert answer.outputs == expected.outputs
        assert answer.prompt_token_ids == expected.prompt_token_ids

    run(main)


def test_a_stop_string_ends_the_stream_and_the_request(llm: LLM, loaded: AsyncLLM) -> None:
    letters = {"allowed_token_ids": list(range(33, 91)), "seed": 5, "ignore_eos": True}
    text = llm.generate("abc", SamplingParams(max_tokens=24, **letters))[0].outputs[0].text
    params = SamplingParams(max_tokens=200, stop=text[4:7], **letters)

    async def main() -> None:
        answer = (await last(loaded.generate("abc", params))).outputs[0]
        assert (answer.text, answer.stop_reason) == (text[: text.index(text[4:7])], text[4:7])
        before = loaded.stats()["generation_tokens"]
        await settled(loaded)
        assert loaded.stats()["generation_tokens"] - before < 10  # not the 200 it might have had

    run(main)


def test_a_slow_reader_finds_all_at_once_and_holds_up_nobody(loaded: AsyncLLM) -> None:
    async def main() -> None:
        slow = loaded.generate("abc", LONG)
        first = await anext(slow)
        await last(loaded.generate("xyz", GREEDY))
        await settled(loaded)
        while not first.finished:  # the last tokens may still be on their way to this loop
            await asyncio.sleep(0.001)
        rest = [output async for output in slow]
        assert len(rest) == 1 and rest[0] is first  # one object, which grew
        assert len(first.outputs[0].token_ids) == 200 and first.finished

    run(main)


def test_a_reader_that_raises_ends_its_request(loaded: AsyncLLM, slow_steps: None) -> None:
    async def read() -> None:
        async for _ in loaded.generate("abc", LONG):
            raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await read()
        assert (await settled(loaded))["generation_tokens"] < before + 200

    before = loaded.stats()["generation_tokens"]
    run(main)


@pytest.mark.parametrize("ticks", range(4))
def test_a_stream_cancelled_before_its_first_token_leaves_nothing(
    loaded: AsyncLLM, ticks: int
) -> None:
    async def main() -> None:
        reading = [asyncio.create_task(last(loaded.generate("abc", LONG))) for _ in range(16)]
        for _ in range(ticks):
            await asyncio.sleep(0)
        for task in reading:
            task.cancel()
        ends = await asyncio.gather(*reading, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        await settled(loaded)

    run(main)


def test_closing_wakes_the_reader_and_later_reads_find_the_end(loaded: AsyncLLM) -> None:
    async def main() -> None:
        unread = loaded.generate("abc", LONG)
        await unread.aclose()
        assert [output async for output in unread] == []
        stream = loaded.generate("abc", LONG)
        await anext(stream)
        reading = asyncio.create_task(_rest(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        await stream.aclose()
        rest = await asyncio.wait_for(reading, timeout=20)
        assert len(rest) <= 1  # what a step brought between the two reads
        await settled(loaded)

    run(main)


def test_a_stream_whose_loop_is_gone_ends_though_it_is_remembered(
    loaded: AsyncLLM, slow_steps: None
) -> None:
    left: list[Any] = []
    before = loaded.stats()["generation_tokens"]

    async def leave() -> None:
        left.append(loaded.generate("abc", LONG))
        await anext(left[0])

    run(leave)
    run(lambda: _settle(loaded))  # heard by nobody, it was ended by the engine's own thread
    assert loaded.stats()["generation_tokens"] - before < 200
    del left[:]


def test_a_stream_closed_while_it_is_prepared_never_reaches_the_engine(loaded: AsyncLLM) -> None:
    async def main() -> None:
        stream = loaded.generate("abc", LONG)
        reading = asyncio.create_task(_rest(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        assert await reading == []

    before = loaded.stats()["num_requests"]
    run(main)
    assert loaded.stats()["num_requests"] == before


async def _rest(stream: Any) -> list[RequestOutput]:
    return [output async for output in stream]


async def _settle(door: AsyncLLM) -> None:
    await settled(door)


def test_a_failed_step_reaches_every_stream_and_the_next_request_is_right(
    llm: LLM, loaded: AsyncLLM, monkeypatch: pytest.MonkeyPatch, slow_steps: None
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device\nis on fire")

    async def main() -> None:
        streams = [loaded.generate(f"{i}", LONG) for i in range(12)]  # 8 run and 4 wait
        reading = [asyncio.create_task(last(stream)) for stream in streams]
        while loaded.stats()["num_running"] < 8:
            await asyncio.sleep(0.001)
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "run", fail)
            ends = await asyncio.gather(*reading, return_exceptions=True)
        for end in ends:
            assert isinstance(end, EngineError)
            assert end.message == "this answer is lost: RuntimeError: the device is on fire"
        await settled(loaded)
        answer = await last(loaded.generate("abc", GREEDY))
        assert answer.outputs == llm.generate("abc", GREEDY)[0].outputs

    run(main)


REFUSALS: dict[str, tuple[Any, str]] = {
    "no ids": ([], "empty"),
    "an id out of range": ([1, 100_000], "100000"),
    "longer than the context": ([7] * CONTEXT, "max_model_len"),
    "a number": (5, "a prompt is 5"),
}


@pytest.mark.parametrize(("prompt", "named"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_bad_prompt_is_refused_and_harms_no_other(
    llm: LLM, loaded: AsyncLLM, prompt: Any, named: str
) -> None:
    async def main() -> None:
        good = asyncio.create_task(last(loaded.generate("abc", GREEDY)))
        stream = loaded.generate(prompt, GREEDY)
        with pytest.raises(RequestError, match=named):
            await anext(stream)
        assert [output async for output in stream] == []
        assert (await good).outputs == llm.generate("abc", GREEDY)[0].outputs
        await settled(loaded)

    run(main)


def test_parameters_that_are_none_of_ours_are_refused_at_once(loaded: AsyncLLM) -> None:
    wrong: Any = {"temperature": 0}
    with pytest.raises(RequestError, match=r"sampling_params is .*temperature"):
        loaded.generate("abc", wrong)


def test_a_prefix_computed_for_one_stream_serves_another(folder: Path, llm: LLM) -> None:
    prompt = "a prompt of several blocks, all but the last of which are found again"

    async def main() -> None:
        async with AsyncLLM(str(folder), **OPTIONS) as door:
            first = await last(door.generate(prompt, GREEDY))
            again = await last(door.generate(prompt, GREEDY))
            assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 64)
            assert again.outputs == first.outputs == llm.generate(prompt, GREEDY)[0].outputs

    run(main)


def test_a_lower_priority_number_goes_first(folder: Path, slow_steps: None) -> None:
    async def main() -> None:
        async with AsyncLLM(str(folder), max_num_seqs=1, dtype="float32") as door:
            first = door.generate("first", LONG_ENOUGH)
            await anext(first)  # the others wait for its row
            late = asyncio.create_task(last(door.generate("late", GREEDY, priority=2)))
            while door.stats()["num_waiting"] < 1:
                await asyncio.sleep(0.001)
            early = await last(door.generate("early", GREEDY, priority=1))
            ended, began = early.metrics.last_token_time, (await late).metrics.first_token_time
            assert ended is not None and began is not None and ended <= began

    run(main)


def test_n_answers_are_those_of_generate(llm: LLM, loaded: AsyncLLM) -> None:
    params = SamplingParams(n=4, seed=9, max_tokens=12)

    async def main() -> None:
        answer = await last(loaded.generate("abc", params))
        assert answer.outputs == llm.generate("abc", params)[0].outputs

    run(main)


def test_two_models_serve_one_loop(folder: Path, llm: LLM) -> None:
    asked = requests(7, 12)
    expected = llm.generate([text for text, _ in asked], [params for _, params in asked])

    async def main() -> None:
        async with AsyncLLM(str(folder), **OPTIONS) as one, AsyncLLM(str(folder), **OPTIONS) as two:
            turns = (one, two)
            streams = [turns[i % 2].generate(*each) for i, each in enumerate(asked)]
            answers = await asyncio.gather(*map(last, streams))
            assert [a.outputs for a in answers] == [e.outputs for e in expected]

    run(main)


def test_a_second_event_loop_is_refused_while_the_first_lives(loaded: AsyncLLM) -> None:
    async def elsewhere() -> None:
        with pytest.raises(UsageError, match="another event loop"):
            await anext(loaded.generate("abc", GREEDY))

    async def main() -> None:
        await last(loaded.generate("abc", GREEDY))
        await asyncio.to_thread(asyncio.run, elsewhere())

    run(main)


def test_closing_ends_streams_with_an_error_and_the_thread(folder: Path, slow_steps: None) -> None:
    async def main() -> None:
        door = AsyncLLM(str(folder), **OPTIONS)
        streams = [door.generate(f"{i}", LONG) for i in range(12)]
        await asyncio.gather(*map(anext, streams[:4]))
        reading = [asyncio.create_task(last(stream)) for stream in streams]
        await asyncio.sleep(0.01)
        door.close()
        door.close()
        for end in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(end, EngineError | UsageError) and "closed" in end.message
        with pytest.raises(UsageError, match="closed; load the model again"):
            await anext(door.generate("abc", GREEDY))

    before = set(threading.enumerate())
    run(main)
    assert set(threading.enumerate()) <= before


def test_a_model_never_closed_does_not_keep_the_program_from_ending(folder: Path) -> None:
    code = (
        "import asyncio\n"
        "from roofline import AsyncLLM, SamplingParams\n"
        f"door = AsyncLLM({str(folder)!r})\n"
        "stream = door.generate('abc', SamplingParams(max_tokens=200, ignore_eos=True))\n"
        "print(asyncio.run(anext(stream)).finished)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
