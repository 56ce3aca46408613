"""Grammars nobody can be trusted with: each costs its own request a line, and no other anything."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from roofline.errors import RequestError
from roofline.grammars.compiler import GrammarCompiler
from roofline.request import SamplingParams
from roofline.structured_outputs import StructuredOutputsParams, TokenMatcher
from roofline.tokenizer import Tokenizer
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size)
    ask(made, choice=["a"])
    yield made
    made.close()


def ask(compiler: GrammarCompiler, n: int = 1, **asked: Any) -> list[TokenMatcher]:
    params = SamplingParams(n=n, structured_outputs=StructuredOutputsParams(**asked))
    matchers = [matcher for matcher in compiler.matchers(params) if matcher is not None]
    assert len(matchers) == n
    return matchers


def rules(count: int) -> str:
    return (
        "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(count)) + f'\nr{count}: "y"'
    )


HOSTILE: dict[str, dict[str, Any]] = {
    "a thousand nested rules overflow the stack": {"grammar": rules(1000)},
    "four thousand too": {"grammar": rules(3500)},
    "many small options take seconds": {"regex": "a?" * 30_000},
    "patterns that might overlap are compared": {
        "json": {"patternProperties": {f"^{i}.*x{i}$": {} for i in range(600)}, "type": "object"}
    },
    "references a thousand deep": {
        "json": {
            "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1500)} | {"d1500": {}},
            "$ref": "#/$defs/d0",
        }
    },
    "four thousand properties": {"json": {"properties": {f"p{i}": {} for i in range(4000)}}},
    "every way to intersect": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(4)]}
                for i in range(20)
            ]
        }
    },
    "no text": {"grammar": "start: start"},
    "nonsense": {"json": {"type": "foo"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_costs_a_line_and_the_next_request_is_right(
    compiler: GrammarCompiler, name: str
) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        ask(compiler, **HOSTILE[name])
    # A second for the trial; the rest is what a busy machine takes to start the next child.
    assert time.monotonic() - started < 10
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    (matcher,) = ask(compiler, regex=f"x{len(name)}")
    assert int.from_bytes(matcher.mask() or b"", "little").bit_count() == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(a+)+b"},
        {"regex": "a{1,1000000000}"},
        {"json": {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 9}}},
        {"json": {"type": "string", "minLength": 10**9}},
        {"json": {"enum": [f"value {i}" for i in range(4000)]}},
        {"grammar": 'start: start "a" | "b"'},
        {"grammar": rules(200)},
        {"json_object": True},
    ],
)
def test_what_only_looks_hostile_is_followed(
    compiler: GrammarCompiler, asked: dict[str, Any]
) -> None:
    first, second = ask(compiler, n=2, **asked)
    assert first is not second and first.mask() == second.mask()


def test_a_grammar_is_compiled_once_however_it_is_written(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size)
    ask(compiler, json={"type": "null"})
    monkeypatch.setattr(compiler, "_sandbox", None)  # any trial fails now
    assert ask(compiler, json='{ "type": "null" }', n=3)
    with pytest.raises(AttributeError):
        ask(compiler, json={"type": "boolean"})


def test_a_known_grammar_does_not_wait_for_one_that_takes_long(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size)
    trying, may_end = threading.Event(), threading.Event()

    def tried(asked: StructuredOutputsParams) -> str:
        if asked.regex == "slow":
            trying.set()
            assert may_end.wait(60)
        return literal(asked.regex or "")

    monkeypatch.setattr(compiler, "_tried", tried)
    (known,) = ask(compiler, regex="known")
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(ask, compiler, regex="slow") for _ in range(2)]
        assert trying.wait(60)
        (again,) = pool.submit(ask, compiler, regex="known").result(timeout=60)
        may_end.set()
        (first,), (second,) = (each.result(timeout=60) for each in slow)
    assert again.mask() == known.mask()
    assert first.mask() == second.mask() != known.mask()


def test_ten_thousand_grammars_leave_no_more_than_the_cache_holds(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size)
    monkeypatch.setattr(compiler, "_tried", lambda asked: literal(asked.regex))
    for index in range(2000):
        ask(compiler, regex=f"{index}")
    before = resident_bytes()
    for index in range(10_000):
        ask(compiler, regex=f"unique {index}")
    assert resident_bytes() - before < 32 << 20
    monkeypatch.setattr(compiler, "_tried", lambda asked: literal("y" * 60_000))
    for index in range(20):
        ask(compiler, regex=f"long {index}")
    assert resident_bytes() - before < 64 << 20


def test_without_a_tokenizer_there_is_no_text_to_structure() -> None:
    with pytest.raises(RequestError, match="need a tokenizer"):
        ask(GrammarCompiler(None, (2,), 64), regex="a")
    assert GrammarCompiler(None, (2,), 64).matchers(SamplingParams(n=2)) == [None, None]


def literal(text: str) -> str:
    return f'start: {json.dumps(text)}\n%llguidance {{"no_forcing": true}}'


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
