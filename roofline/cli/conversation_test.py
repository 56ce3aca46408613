from pathlib import Path

import pytest

from roofline import LLM
from roofline.cli import figures
from roofline.cli.conversation import Conversation, Turn
from roofline.errors import RequestError
from roofline.request import SamplingParams
from tests.fake_llm import NO_SYSTEM, FakeLLM
from tests.tiny_model import write_tiny_model

GREEDY = SamplingParams(temperature=0)


def test_an_answer_comes_in_pieces_and_the_next_question_sees_it() -> None:
    fake, llm = FakeLLM.make()
    conversation = Conversation(llm, GREEDY, "Be kind.")
    assert list(conversation.ask("one two three")) == ["one", " two", " three"]
    assert list(conversation.ask("four")) == ["four"]
    assert fake.asked[1] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "one two three"},
        {"role": "user", "content": "four"},
    ]
    assert fake.params == [GREEDY, GREEDY]
    assert conversation.context_tokens() == (2 + 3 + 3 + 1) + 1


def test_a_closed_answer_is_kept_as_far_as_it_came_and_leaves_the_engine() -> None:
    fake, llm = FakeLLM.make()
    conversation = Conversation(llm, GREEDY)
    pieces = conversation.ask("one two three")
    assert [next(pieces), next(pieces)] == ["one", " two"]
    assert fake.alive == 1
    pieces.close()
    assert fake.alive == 0
    assert conversation.turns == [Turn("one two three", "one two", "abort")]
    assert list(conversation.ask("and")) == ["and"]
    assert fake.asked[1][1] == {"role": "assistant", "content": "one two"}


def test_an_answer_interrupted_from_within_is_kept_too() -> None:
    fake, llm = FakeLLM.make()
    conversation = Conversation(llm, GREEDY)
    pieces = conversation.ask("one two three")
    next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert fake.alive == 0
    assert conversation.turns == [Turn("one two three", "one", "abort")]


def test_a_question_stopped_before_its_answer_began_is_forgotten() -> None:
    fake, llm = FakeLLM.make()
    conversation = Conversation(llm, GREEDY)
    pieces = conversation.ask("silence one")
    assert next(pieces) == ""
    pieces.close()
    assert conversation.turns == []
    list(conversation.ask("two"))
    assert fake.asked[1] == [{"role": "user", "content": "two"}]


def test_a_full_context_is_told_with_both_numbers_and_costs_nothing() -> None:
    fake, llm = FakeLLM.make(max_model_len=6)
    conversation = Conversation(llm, GREEDY)
    list(conversation.ask("one two"))
    with pytest.raises(RequestError, match=r"has 6 tokens, and max_model_len is 6; .*/clear"):
        list(conversation.ask("three four"))
    assert conversation.turns == [Turn("one two", "one two", "stop")]
    assert conversation.context_tokens() == 4
    conversation.clear()
    assert conversation.context_tokens() == 0
    assert list(conversation.ask("three four")) == ["three", " four"]
    assert fake.alive == 0


def test_a_system_message_the_template_refuses_changes_nothing() -> None:
    _, llm = FakeLLM.make()
    with pytest.raises(RequestError, match="no system role"):
        Conversation(llm, GREEDY, NO_SYSTEM)
    conversation = Conversation(llm, GREEDY, "Be kind.")
    with pytest.raises(RequestError, match="no system role"):
        conversation.system = NO_SYSTEM
    assert conversation.system == "Be kind."


def test_a_refusal_that_is_not_about_length_is_passed_on() -> None:
    _, llm = FakeLLM.make()
    conversation = Conversation(llm, GREEDY)
    with pytest.raises(RequestError, match=r"^the chat template refused"):
        list(conversation.ask(NO_SYSTEM))
    assert conversation.turns == []


def test_a_new_system_message_keeps_the_turns() -> None:
    fake, llm = FakeLLM.make()
    conversation = Conversation(llm, GREEDY, "Be kind.")
    list(conversation.ask("one"))
    conversation.system = "Be brief."
    list(conversation.ask("two"))
    assert [message["content"] for message in fake.asked[1]] == ["Be brief.", "one", "one", "two"]
    conversation.system = None
    list(conversation.ask("three"))
    assert fake.asked[2][0] == {"role": "user", "content": "one"}


def test_the_transcript_says_how_each_answer_ended() -> None:
    _, llm = FakeLLM.make()
    conversation = Conversation(llm, GREEDY, "Be kind.")
    list(conversation.ask("one"))
    pieces = conversation.ask("two three")
    next(pieces)
    pieces.close()
    assert conversation.transcript() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one", "finish_reason": "stop"},
        {"role": "user", "content": "two three"},
        {"role": "assistant", "content": "two", "finish_reason": "abort"},
    ]


def test_a_stopped_answer_gives_its_blocks_back_and_the_next_finds_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "bandwidth_gb_s", lambda threads, **_: 20.0)
    endless = SamplingParams(temperature=0, ignore_eos=True)
    with LLM(str(write_tiny_model(tmp_path)), max_num_seqs=1) as llm:
        conversation = Conversation(llm, endless)
        assert conversation.report() is None
        pieces = conversation.ask("Hello")
        for _ in range(30):
            next(pieces)
        assert llm.stats()["num_used_blocks"] > 0
        pieces.close()
        stats = llm.stats()
        assert (stats["num_running"], stats["num_waiting"], stats["num_used_blocks"]) == (0, 0, 0)
        list(conversation.ask("And now?"))
        report = conversation.report()
        with pytest.raises(RequestError, match="/clear"):
            list(conversation.ask("x" * llm.max_model_len))
        assert conversation.report() == report  # still that of the last answer
    assert [turn.finish_reason for turn in conversation.turns] == ["abort", "length"]
    assert report is not None
    assert 16 <= report["cached_tokens"] < report["prompt_tokens"]
    assert conversation.context_tokens() == llm.max_model_len
    assert report["completion_tokens"] == llm.max_model_len - report["prompt_tokens"]
    assert report["ttft_s"] > 0 and report["roofline_fraction"] > 0
