import json
from pathlib import Path

import pytest

from roofline import LLM
from roofline.cli import dataset
from roofline.errors import UsageError
from tests.tiny_model import write_tiny_model

HELLO = [{"role": "user", "content": "hello"}]


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_each_shape_of_a_line_is_read_and_the_first_lines_only(tmp_path: Path) -> None:
    documents = [
        {"prompt": "text"},
        {"messages": HELLO, "id": 5},
        {"turns": ["hello", "again"], "category": "writing"},
    ]
    path = write(tmp_path / "a.jsonl", *map(json.dumps, documents), "", "not read")
    assert dataset.read(path, 3) == ["text", HELLO, HELLO]
    assert dataset.read(path, 1) == ["text"]
    with pytest.raises(UsageError, match=r"a.jsonl:5: is not JSON"):
        dataset.read(path, 4)


def test_texts_are_continued_and_messages_answered(tmp_path: Path) -> None:
    with LLM(str(write_tiny_model(tmp_path))) as llm:
        tokenizer = llm.get_tokenizer()
        expected = [tokenizer.encode("hello"), tokenizer.apply_chat_template(HELLO)]
        assert dataset.encode(["hello", HELLO], llm) == expected


@pytest.mark.parametrize(
    "line",
    ["[]", "5", "{}", '{"prompt": 5}', '{"messages": []}', '{"turns": []}', '{"turns": [5]}'],
)
def test_a_line_of_another_shape_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "text"}', line)
    with pytest.raises(UsageError, match=r"a.jsonl:2: is .*; it must have prompt"):
        dataset.read(path, 5)


def test_files_without_prompts_or_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no prompt"):
        dataset.read(write(tmp_path / "empty.jsonl"), 5)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "absent.jsonl", tmp_path / "bytes.jsonl"):
        with pytest.raises(UsageError, match="cannot be read"):
            dataset.read(str(path), 5)
    with pytest.raises(UsageError, match=r"deep.jsonl:1: is not JSON"):
        dataset.read(write(tmp_path / "deep.jsonl", "[" * 100_000), 5)
