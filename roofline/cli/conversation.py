"""A conversation with a model: its turns, how it samples, and the figures of its last answer.

What a person types and sees is in `chat`, `chat_commands` and `line_editor`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Generator
from typing import Any

import roofline  # the public door: what it names loads on use, torch with it
from roofline.cli import figures
from roofline.errors import RequestError
from roofline.request import SamplingParams


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer; one that was stopped has the reason "abort"."""

    question: str
    answer: str
    finish_reason: str


class Conversation:
    """Turns that the model sees again with every question: the prefix cache makes that cheap."""

    def __init__(
        self, llm: "roofline.LLM", sampling: SamplingParams, system: str | None = None
    ) -> None:
        self.llm = llm
        self.sampling = sampling
        self.initial_sampling = sampling
        self.turns: list[Turn] = []
        self.output: roofline.RequestOutput | None = None  # of the last question answered
        self._asked = 0.0  # when it was asked, seconds of time.monotonic
        self._system: str | None = None
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message that opens the conversation."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        """Open with `text` from the next question on; refused where the template takes none."""
        self.llm.get_tokenizer().apply_chat_template(_messages(text, [], "?"))
        self._system = text

    def ask(self, question: str) -> Generator[str]:
        """Yield the answer's text as it is made: after every step what it added, perhaps nothing.

        Closed or interrupted before its end, what there is of the answer is kept; without any, the
        question is forgotten too, as templates want an answer to each. So is one refused.
        """
        messages = _messages(self._system, self.turns, question)
        asked = time.monotonic()
        output: roofline.RequestOutput | None = None
        shown = 0
        try:
            answer = self.llm.chat(messages, self.sampling, stream=True)
            with contextlib.closing(answer):
                for output in answer:
                    text = output.outputs[0].text
                    yield text[shown:]
                    shown = len(text)
        except RequestError as error:
            self._explain(messages, error)
        finally:
            if output is not None:
                self._keep(question, output, asked)

    def clear(self) -> None:
        """Forget all turns; the system message and the sampling options stay."""
        self.turns = []
        self.output = None

    def transcript(self) -> list[dict[str, str]]:
        """All messages; an answer says how it ended."""
        messages = _messages(self._system, self.turns)
        answers = [message for message in messages if message["role"] == "assistant"]
        for message, turn in zip(answers, self.turns, strict=True):
            message["finish_reason"] = turn.finish_reason
        return messages

    def context_tokens(self) -> int:
        """Tokens of the context that the last question and its answer took."""
        if self.output is None:
            return 0
        return len(self.output.prompt_token_ids) + len(self.output.outputs[0].token_ids)

    def report(self) -> dict[str, Any] | None:
        """The figures of the last answer, as `run` reports them; None before its first token."""
        output = self.output
        if output is None or output.metrics.first_token_time is None:
            return None
        bandwidth = figures.bandwidth_gb_s(self.llm.config.threads, device=self.llm.config.device)
        return {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "completion_tokens": len(output.outputs[0].token_ids),
            "ttft_s": output.metrics.first_token_time - self._asked,
            **figures.Decoding.of(self.llm, [output]).report(bandwidth),
        }

    def _keep(self, question: str, output: "roofline.RequestOutput", asked: float) -> None:
        self.output, self._asked = output, asked
        answer = output.outputs[0]
        reason = answer.finish_reason or "abort"
        if answer.text or reason != "abort":
            self.turns.append(Turn(question, answer.text, reason))

    def _explain(self, messages: list[dict[str, str]], error: RequestError) -> None:
        """Raise the refusal; one for length says what to do about it."""
        tokens = len(self.llm.get_tokenizer().apply_chat_template(messages))
        if tokens < self.llm.max_model_len:
            raise error
        raise RequestError(
            f"with this message the conversation has {tokens} tokens, and max_model_len is "
            f"{self.llm.max_model_len}; nothing was cut off and the message was not sent: "
            "/clear begins anew"
        ) from error


def _messages(
    system: str | None, turns: list[Turn], question: str | None = None
) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages if question is None else [*messages, {"role": "user", "content": question}]
