"""`roofline run`: one prompt, its answer on stdout as it is made, its figures on stderr.

Prompt and options are checked before anything is loaded.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from cyclopts import Parameter

import roofline  # the public door: what it names loads on use, torch with it
from roofline.cli import figures, options, output
from roofline.config import EngineConfig
from roofline.errors import UsageError
from roofline.request import SamplingParams

_SAMPLING = {"temperature": 0.0}  # the same question has the same answer
_ENGINE = {"max_num_seqs": 1}  # a KV pool for one


@options.accepts(options.sampling_options(_SAMPLING), options.engine_options(_ENGINE))
def run(
    model: options.Model,
    prompt: Annotated[
        str | None,
        Parameter(help="the text to answer; - or none: stdin, without the newline at its end"),
    ] = None,
    /,
    *,
    raw: Annotated[bool, Parameter(help="continue the text; no chat template")] = False,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Answer a prompt: the text on stdout as it is made, one line of figures on stderr.

    Greedy unless --temperature says otherwise, so that the same prompt has the same answer.
    """
    sampling = _sampling_params(options.take_sampling(given))
    config = EngineConfig.from_options(given, os.environ, _ENGINE)
    text = _read_prompt(prompt)
    started = time.monotonic()
    with roofline.LLM.from_config(model, config) as llm:
        submitted = time.monotonic()
        answer = _answer(_stream(llm, model, text, sampling, raw=raw), show=not json)
        decoding, loaded = figures.Decoding.of(llm, [answer]), llm.config
    bandwidth = figures.bandwidth_gb_s(
        loaded.threads, device=loaded.device, reached=decoding.read_gb_s()
    )
    measured = {
        "load_s": submitted - started,
        "ttft_s": (answer.metrics.first_token_time or submitted) - submitted,
        **decoding.report(bandwidth),
    }
    if json:
        output.print_json(_answered(answer) | measured)
    else:
        print(figures.one_line(_answered(answer) | measured), file=sys.stderr)


def _sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """Check sampling options; those that would do nothing are refused."""
    params = SamplingParams.from_options({**_SAMPLING, **given})
    for name in sorted(options.TRUNCATION):
        if name in given and params.temperature == 0:
            raise UsageError(f"{name} does nothing at temperature 0; add --temperature 1")
    return params


def _read_prompt(prompt: str | None) -> str:
    """The prompt as given, or all of stdin; without the newline that a shell adds."""
    if prompt is None or prompt == "-":
        if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
            raise UsageError("no prompt: write it after the model, or pipe it in")
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin is not UTF-8 at byte {error.start}") from error
    prompt = prompt.removesuffix("\n")
    if not prompt:
        raise UsageError("the prompt is empty; it must have at least one character")
    return prompt


def _stream(
    llm: "roofline.LLM", model: str, text: str, sampling: SamplingParams, *, raw: bool
) -> "Iterator[roofline.RequestOutput]":
    if raw:
        return llm.generate(text, sampling, stream=True)
    if llm.get_tokenizer().chat_template is None:
        raise UsageError(f"{model} has no chat template; --raw continues the text as it is")
    return llm.chat([{"role": "user", "content": text}], sampling, stream=True)


def _answer(stream: "Iterator[roofline.RequestOutput]", *, show: bool) -> "roofline.RequestOutput":
    """Read to the end, showing text as it comes; a step without new text shows nothing."""
    shown = 0
    for answer in stream:
        if show:
            text = answer.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    if show:
        print()
    return answer


def _answered(answer: "roofline.RequestOutput") -> dict[str, Any]:
    (completion,) = answer.outputs
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_tokens": len(answer.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
