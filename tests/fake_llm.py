"""A model that answers each message with its own words, one a step; for tests of what chats do."""

from collections.abc import Generator, Sequence
from typing import cast

import roofline
from roofline.doors.outputs import CompletionOutput, RequestMetrics, RequestOutput
from roofline.errors import RequestError
from roofline.request import SamplingParams

NO_SYSTEM = "no system messages, please"


class FakeLLM:
    """What a chat uses of an LLM. A token is a word; the template writes contents, nothing else."""

    def __init__(self, max_model_len: int = 100) -> None:
        self.max_model_len = max_model_len
        self.chat_template: str | None = "a template"
        self.asked: list[list[dict[str, str]]] = []
        self.params: list[SamplingParams] = []
        self.alive = 0  # answers begun and not ended

    @classmethod
    def make(cls, max_model_len: int = 100) -> tuple["FakeLLM", "roofline.LLM"]:
        """The same object twice: as what it is, and as what it stands for."""
        fake = cls(max_model_len)
        return fake, cast("roofline.LLM", fake)

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.alive == 0

    def default_sampling_params(self) -> SamplingParams:
        """What its generation_config says."""
        return SamplingParams(temperature=0.7, top_p=0.9)

    def get_tokenizer(self) -> "FakeLLM":
        """Itself: it has the one method that a chat uses."""
        return self

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """One id a word."""
        if any(message["content"] == NO_SYSTEM for message in messages):
            raise RequestError("the chat template refused the messages: no system role")
        return [0] * sum(len(message["content"].split()) for message in messages)

    def chat(
        self, messages: list[dict[str, str]], params: SamplingParams, *, stream: bool
    ) -> Generator[RequestOutput]:
        """Answer with the words of the last message, each after a step; "silence" is none at all.

        A prompt is checked before anything runs; the answer ends where the context does.
        """
        assert stream
        ids = self.apply_chat_template(messages)
        if len(ids) >= self.max_model_len:
            raise RequestError(f"the prompt has {len(ids)} tokens")
        self.asked.append([dict(message) for message in messages])
        self.params.append(params)
        return self._answer(ids, messages[-1]["content"].split(" "), params)

    def _answer(
        self, ids: list[int], words: list[str], params: SamplingParams
    ) -> Generator[RequestOutput]:
        output = RequestOutput("0", None, ids, [CompletionOutput(0)], RequestMetrics(0.0, 1.0, 2.0))
        (answer,) = output.outputs
        room = min(self.max_model_len - len(ids), params.max_tokens or self.max_model_len)
        self.alive += 1
        try:
            for index, word in enumerate(words):
                if word == "silence":
                    answer.token_ids.append(1)
                    yield output
                    continue
                answer.text += word if not answer.text else f" {word}"
                answer.token_ids.append(0)
                if index + 1 == len(words):
                    answer.finish_reason = "stop"
                elif index + 1 == room:
                    answer.finish_reason = "length"
                yield output
                if answer.finish_reason:
                    return
        finally:
            self.alive -= 1
