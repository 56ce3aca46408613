"""`roofline ppl`: perplexity of a text file under a model, in windows that overlap.

The text is scored through the same engine that answers prompts, as `prompt_logprobs`.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import roofline  # the public door: what it names loads on use, torch with it
from roofline.cli import options, output
from roofline.config import EngineConfig
from roofline.errors import RequestError, UsageError
from roofline.request import SamplingParams


@options.accepts(options.engine_options(without=("chat_template", "generation_config")))
def ppl(
    model: options.Model,
    file: Annotated[
        str, Parameter(help="UTF-8 text, taken as it is; BOS goes before it if the model adds one")
    ],
    /,
    *,
    context: Annotated[int, Parameter(help="tokens of a window")] = 1024,
    stride: Annotated[
        int, Parameter(help="of a window's tokens, the last so many are scored")
    ] = 512,
    windows: Annotated[int | None, Parameter(help="the first so many; default: all")] = None,
    json: options.Json = False,
    **given: Any,
) -> None:
    """Measure perplexity on a text file."""
    _check_windows(context, stride, windows)
    config = EngineConfig.from_options(given, os.environ)
    data, text = _read(file)
    with roofline.LLM.from_config(model, config) as llm:
        if context >= llm.max_model_len:
            raise UsageError(
                f"--context {context} is too long: requests hold {llm.max_model_len} tokens here, "
                "one of them to answer"
            )
        ids = llm.get_tokenizer().encode(text)
        cuts = _windows(file, len(ids), context, stride, windows)
        nlls = list(_negative_log_likelihoods(llm, [ids[cut] for cut in cuts], stride))
    nll = math.fsum(nlls) / len(nlls)
    report = {
        "perplexity": math.exp(nll),
        "nll": nll,  # mean of a token, in nats
        "tokens_scored": len(nlls),
        "context": context,
        "stride": stride,
        "windows": len(cuts),
        "window_nlls": [  # sums, nats: two runs are best compared window by window
            math.fsum(nlls[first : first + stride]) for first in range(0, len(nlls), stride)
        ],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    if json:
        output.print_json(report)
    else:
        print(f"perplexity {report['perplexity']:.4f} over {len(nlls):,} tokens of {file}")


def _check_windows(context: int, stride: int, windows: int | None) -> None:
    if context < 2:
        raise UsageError(f"--context is {context}; it must be at least 2")
    if not 1 <= stride < context:
        raise UsageError(
            f"--stride is {stride}; it must be from 1 to {context - 1}, below --context"
        )
    if windows is not None and windows < 1:
        raise UsageError(f"--windows is {windows}; it must be at least 1")


def _read(file: str) -> tuple[bytes, str]:
    """The file's bytes and their text, no newline touched."""
    try:
        data = Path(file).read_bytes()
        return data, data.decode()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 at byte {error.start}") from error


def _windows(file: str, tokens: int, context: int, stride: int, most: int | None) -> list[slice]:
    """Windows of `context` tokens that start `stride` apart; a rest at the end is not scored."""
    starts = range(0, tokens - context + 1, stride)[:most]
    if not starts:
        raise RequestError(
            f"{file} has {tokens} tokens, fewer than one window of {context}; lower --context"
        )
    if most is not None and len(starts) < most:
        raise RequestError(f"{file} has {len(starts)} windows, fewer than --windows {most}")
    return [slice(start, start + context) for start in starts]


def _negative_log_likelihoods(
    llm: "roofline.LLM", windows: Sequence[Sequence[int]], scored: int
) -> Iterator[float]:
    """Of the last `scored` tokens of each window, in nats."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with output.progress() as bar:
        for window in bar.track(windows, description="Scoring"):
            (scored_window,) = llm.generate([list(window)], params)
            positions = scored_window.prompt_logprobs or []
            for token, position in zip(window[-scored:], positions[-scored:], strict=True):
                assert position is not None, "only the first token of a prompt has no probability"
                yield -position[token].logprob
