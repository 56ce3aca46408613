"""Prompts from a .jsonl file, one object a line, in the shapes that data sets come in.

A line has `prompt` (a text to continue), `messages` (a conversation to answer) or `turns` (what a
user says turn by turn; the first is asked).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import roofline  # the public door: what it names loads on use, torch with it
from roofline.errors import UsageError, shown

Asked = str | list[dict[str, Any]]  # a text to continue, or messages to answer


def read(path: str, count: int) -> list[Asked]:
    """The first `count` lines of a file, or all it has."""
    asked: list[Asked] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(asked) == count:
                    break
                if line.strip():
                    asked.append(_asked(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not asked:
        raise UsageError(f"{path}: holds no prompt; each line must be one JSON object")
    return asked


def encode(asked: Sequence[Asked], llm: "roofline.LLM") -> list[list[int]]:
    """Token ids, as the model would get them."""
    tokenizer = llm.get_tokenizer()
    return [
        tokenizer.encode(each) if isinstance(each, str) else tokenizer.apply_chat_template(each)
        for each in asked
    ]


def _asked(line: str, where: str) -> Asked:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not JSON: {error}") from error
    match document:
        case {"prompt": str(text)}:
            return text
        case {"messages": [_, *_] as messages}:
            return messages
        case {"turns": [str(text), *_]}:
            return [{"role": "user", "content": text}]
    raise UsageError(
        f"{where}: is {shown(document)}; it must have prompt (a text), messages (a list) or "
        "turns (a list of texts)"
    )
