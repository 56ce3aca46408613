"""Masks against the definition: a token may come when its bytes may, whatever the tokenizer."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLTokenizer

from roofline.config import EngineConfig
from roofline.errors import RequestError
from roofline.grammars.matching import Grammar, GrammarMatcher, Vocabulary
from roofline.grammars.trial import compiled, trial
from roofline.models.opening import open_model
from roofline.request import SamplingParams
from roofline.tokenizer import Tokenizer
from tests.sentencepiece_model import gguf_metadata, write_tokenizer_bin, write_tokenizer_json
from tests.tiny_model import write_tiny_model

NO_FORCING = '%llguidance {"no_forcing": true}'
PADDING = 37  # rows of the embedding beyond the vocabulary
SCHEMA = '{"type":"object","properties":{"é":{"type":"string"},"n":{"type":"number"}}}'
GRAMMARS = {
    "json": trial("json", SCHEMA, None),
    "regex": trial("regex", r"( ?\p{L}+[.,\n])*( the| [0-9]{2,3}| 😀)", None),
    "choice": trial("choice", [" the river", "the river", "the", "river <s>", "</s>"], None),
    "any": trial("regex", r"(?s:.*)", None),
}


@pytest.fixture(scope="module", params=["bytes", "gguf", "tokenizer.bin", "prepend", "metaspace"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        return Tokenizer.from_folder(write_tiny_model(folder))
    if request.param == "gguf":
        return Tokenizer.from_gguf(gguf_metadata(), "model.gguf")
    if request.param == "tokenizer.bin":
        return Tokenizer.from_llama2c(write_tokenizer_bin(folder / "tokenizer.bin"))
    return Tokenizer.from_folder(write_tokenizer_json(folder, request.param))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary_of(tokenizer)


def vocabulary_of(tokenizer: Tokenizer, ends: tuple[int, ...] | None = None) -> Vocabulary:
    ends = tokenizer.eos_token_ids if ends is None else ends
    return Vocabulary(tokenizer, ends, tokenizer.vocab_size + PADDING)


def allowed(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def follow(matcher: GrammarMatcher, tokenizer: Tokenizer, text: str) -> bool:
    """Feed a text byte by byte or piece by piece, as the masks allow; whether it is complete."""
    data = text.encode()
    while data:
        candidates = [t for t in allowed(matcher.mask()) if t < tokenizer.vocab_size]
        fitting = [t for t in candidates if data.startswith(tokenizer.token_bytes(t))]
        token = max(fitting, key=lambda t: len(tokenizer.token_bytes(t)))
        data = data[len(tokenizer.token_bytes(token)) :]
        done = matcher.accept(token)
        assert not (done and data), "complete before the text is"
        if done:
            return True
    return False


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_token_may_come_exactly_when_its_bytes_may(
    tokenizer: Tokenizer, vocabulary: Vocabulary, name: str
) -> None:
    grammar = Grammar(GRAMMARS[name], vocabulary)
    ends = set(tokenizer.eos_token_ids)
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    text = [t for t in range(len(pieces)) if t not in tokenizer.special_ids and pieces[t]]
    for seed in range(3):
        chance = random.Random(seed)
        matcher = grammar.matcher(SamplingParams())
        oracle = compiled(GRAMMARS[name], LLTokenizer("byte"))
        for _ in range(12):
            mask = matcher.mask()
            expected = {
                t for t in text if oracle.validate_tokens(list(pieces[t])) == len(pieces[t])
            }
            if oracle.is_accepting():
                expected |= ends
            assert set(allowed(mask)) == expected
            token = chance.choice(sorted(expected - ends) or sorted(expected))
            if token in ends:
                break
            oracle.consume_tokens(list(pieces[token]))
            if matcher.accept(token):
                assert oracle.is_stopped()
                break


def test_special_tokens_are_never_text(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    matcher = Grammar(GRAMMARS["any"], vocabulary).matcher(SamplingParams())
    for _ in range(3):
        seen = set(allowed(matcher.mask()))
        assert seen & tokenizer.special_ids == set(tokenizer.eos_token_ids)
        assert max(seen) < tokenizer.vocab_size
        assert not matcher.accept(max(seen - tokenizer.special_ids))


def test_even_a_grammar_of_token_ids_makes_no_special_token(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    """No such grammar passes its trial; what it could ask for is masked all the same."""
    everything = f'start: "a" <[0-{tokenizer.vocab_size - 1}]>* "b"\n{NO_FORCING}'
    matcher = Grammar(everything, vocabulary).matcher(SamplingParams())
    follow(matcher, tokenizer, "a")
    assert not tokenizer.special_ids.intersection(allowed(matcher.mask()))


def test_a_complete_text_is_complete_without_an_end(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    grammar = Grammar(GRAMMARS["choice"], vocabulary)
    assert follow(grammar.matcher(SamplingParams()), tokenizer, "river <s>")
    longer = grammar.matcher(SamplingParams())
    assert not follow(longer, tokenizer, "the")
    assert set(tokenizer.eos_token_ids) <= set(allowed(longer.mask()))
    assert longer.accept(tokenizer.eos_token_ids[0])


def test_a_text_told_to_ignore_eos_ends_where_the_grammar_does(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    matcher = Grammar(GRAMMARS["choice"], vocabulary).matcher(SamplingParams(ignore_eos=True))
    assert not follow(matcher, tokenizer, "the")
    assert not set(tokenizer.eos_token_ids) & set(allowed(matcher.mask()))
    assert follow(matcher, tokenizer, " river")


def test_every_end_of_a_model_is_allowed_and_none_where_it_has_none(tokenizer: Tokenizer) -> None:
    ends = (*tokenizer.eos_token_ids, 7)
    for named in (ends, (7, *ends[:-1]), ()):
        vocabulary = vocabulary_of(tokenizer, named)
        grammar = Grammar(trial("regex", "(the)*", None), vocabulary)
        matcher = grammar.matcher(SamplingParams())
        text = {t for t in allowed(matcher.mask()) if t not in named}
        assert set(allowed(matcher.mask())) == {*text, *named}
        assert max(text) < tokenizer.vocab_size
        assert not follow(matcher, tokenizer, "the")
        assert set(named) <= set(allowed(matcher.mask()))
        complete = Grammar(trial("choice", ["the"], None), vocabulary).matcher(SamplingParams())
        assert follow(complete, tokenizer, "the")


def test_a_grammar_of_nothing_but_the_empty_text_ends_at_once(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    grammar = Grammar(trial("regex", "a{0}", None), vocabulary)
    for params in (SamplingParams(), SamplingParams(ignore_eos=True)):
        matcher = grammar.matcher(params)
        assert allowed(matcher.mask()) == sorted(tokenizer.eos_token_ids)
        assert matcher.accept(tokenizer.eos_token_ids[0])


def test_allowed_token_ids_and_the_grammar_both_hold(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    grammar = Grammar(trial("regex", "[abc]{2}x", None), vocabulary)
    a, b = tokenizer.encode("a")[-1:], tokenizer.encode("b")[-1:]
    single = [t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) in (b"a", b"b")]
    matcher = grammar.matcher(SamplingParams(allowed_token_ids=[*single, *a, *b]))
    assert allowed(matcher.mask()) == single
    matcher.accept(single[0])
    with pytest.raises(RequestError, match="allowed_token_ids leaves no token"):
        matcher.accept(single[-1])
    with pytest.raises(RequestError, match="allowed_token_ids leaves no token"):
        grammar.matcher(SamplingParams(allowed_token_ids=[0]))
    with pytest.raises(RequestError, match="allowed_token_ids token id"):
        grammar.matcher(SamplingParams(allowed_token_ids=[10**6]))


def test_matchers_of_one_grammar_go_their_own_ways(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    grammar = Grammar(GRAMMARS["choice"], vocabulary)
    first, second = (grammar.matcher(SamplingParams()) for _ in range(2))
    before = second.mask()
    follow(first, tokenizer, "the")
    assert second.mask() == before != first.mask()
    assert grammar.matcher(SamplingParams()).mask() == before
    assert follow(second, tokenizer, "river <s>")


@pytest.fixture(scope="module")
def real(smollm2_path: Path) -> tuple[Tokenizer, Vocabulary]:
    opened = open_model(str(smollm2_path), EngineConfig())
    opened.checkpoint.close()
    tokenizer = opened.tokenizer
    assert tokenizer is not None
    return tokenizer, Vocabulary(tokenizer, tokenizer.eos_token_ids, opened.config.vocab_size)


def test_a_text_is_followed_over_a_real_vocabulary(real: tuple[Tokenizer, Vocabulary]) -> None:
    tokenizer, vocabulary = real
    matcher = Grammar(GRAMMARS["json"], vocabulary).matcher(SamplingParams())
    assert len(matcher.mask()) == 49152 // 8
    assert not follow(matcher, tokenizer, '{\n  "é": "naïve 😀 the river",\n  "n": -12.5e3')
    assert follow(matcher, tokenizer, "\n}")


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("regex", "(((((\\w{1,50}){1,50}){1,50}){1,50}){1,50}){1,50}", "lexer precomputation"),
        ("regex", "(.*[a-m].{1,40}){10}[xyz].*", "too many"),
        ("regex", ".*[a-m].{100}x.*", "too many states"),
        ("grammar", "start: s\ns: s s s | /[a-z ]/ ", "Too many items"),
    ],
)
def test_a_grammar_too_hard_to_follow_gives_up_with_a_reason_and_soon(
    real: tuple[Tokenizer, Vocabulary], kind: str, source: str, reason: str
) -> None:
    _, vocabulary = real
    chance = random.Random(5)
    longest = 0.0
    with pytest.raises(RequestError, match=f"cannot go on: .*{reason}"):
        matcher = Grammar(trial(kind, source, None), vocabulary).matcher(SamplingParams())
        for _ in range(300):
            token = chance.choice(allowed(matcher.mask()))
            started = time.thread_time()
            matcher.accept(token)
            longest = max(longest, time.thread_time() - started)
    assert longest < 1.0, "one request's step held up all others"
