"""A vocabulary from a model folder: tokenizer.json, and what the files beside it say of it.

The files are untrusted. Which words and merges tokenizer.json describes is read by the `tokenizers`
library; here is checked what it would not refuse in words.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken

from roofline.config import option_path
from roofline.errors import CheckpointError, UnsupportedError
from roofline.tokenizer.chat_template import ChatTemplate
from roofline.tokenizer.sentencepiece_bpe import SPACE, sentencepiece_bytes
from roofline.tokenizer.text_steps import runaway_step
from roofline.tokenizer.vocabulary import (
    TOKEN_NAMES,
    Vocabulary,
    byte_level_bytes,
    refusing_bad_vocabulary,
)

Kind = TypeVar("Kind")

_MAX_FILE_BYTES = 1 << 27
_MAX_ID = 1 << 24

# The decoders of SentencePiece's pieces; the last where encoding puts a space before a text.
_SENTENCEPIECE_STEPS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def vocabulary_from_folder(path: str | os.PathLike[str]) -> Vocabulary:
    """Check and build from tokenizer.json; the other files need not be there."""
    folder = Path(path)
    fields = _Fields(folder / "tokenizer.json")
    fault = runaway_step(fields.get("normalizer", object), fields.get("pre_tokenizer", object))
    if fault is not None:
        raise UnsupportedError(f"{fields.file}: {fault}")
    piece_bytes, leads_with_space = _decoding(fields)
    bpe, size = _read_tokenizer(fields)
    config = _Fields(folder / "tokenizer_config.json", required=False)
    named = {name: found for name in TOKEN_NAMES if (found := _named_token(config, name, bpe))}
    prefix, suffix = _surroundings(bpe)
    if max((*prefix, *suffix), default=0) >= size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: post_processor puts ids {[*prefix, *suffix]} around a "
            f"text, not all of which are in the vocabulary of {size}"
        )
    ids = {name: id for name, (_, id) in named.items()}
    return Vocabulary(
        source=str(folder),
        bpe=bpe,
        size=size,
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=(ids["eos_token"],) if "eos_token" in ids else (),
        prefix=prefix,
        suffix=suffix,
        chat_templates=_chat_templates(folder, config),
        context_tokens=_Fields(folder / "config.json", required=False).get(
            "max_position_embeddings", int
        ),
        template_tokens={name: text for name, (text, _) in named.items()},
        piece_bytes=piece_bytes,
        leads_with_space=leads_with_space,
    )


def read_chat_template(option: str) -> ChatTemplate:
    """A template from its own text, a file of that, or a JSON file's field `chat_template`."""
    if "{{" in option or "{%" in option:
        return ChatTemplate({"default": option})
    file = option_path("chat_template", option, "a file, or a template's text")
    if file.suffix != ".json":
        return ChatTemplate({"default": _read(file)}, str(file))
    sources = _named_templates(_Fields(file))
    if not sources:
        raise CheckpointError(f"{file}: has no chat_template")
    return ChatTemplate(sources, f"{file}: chat_template")


class _Fields:
    """A JSON object in a file, and typed look-ups in it."""

    def __init__(self, file: Path, *, required: bool = True) -> None:
        self.file = file
        self.text = _read(file) if required or file.exists() else "{}"
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: is {_named(value)}; it must be a JSON object")
        self._fields: Mapping[str, Any] = value

    def get(self, name: str, kind: type[Kind]) -> Kind | None:
        """Return a field, None without it or where it is null; dots lead into objects."""
        value: Any = self._fields
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None or isinstance(value, kind):
            return value
        raise self.wrong(name, f"is {_named(value)}; it must be {kind.__name__}")

    def wrong(self, name: str, fault: str) -> CheckpointError:
        """Say what is wrong with a field."""
        return CheckpointError(f"{self.file}: {name} {fault}")


def _decoding(fields: _Fields) -> tuple[Callable[[str], bytes], bool]:
    """What a piece stands for, and whether a text's first space is taken off, by the decoder."""
    model, decoder = fields.get("model.type", str), fields.get("decoder.type", str)
    if model != "BPE":
        raise UnsupportedError(
            f"{fields.file}: model.type {model} is not supported; supported: BPE"
        )
    if decoder == "ByteLevel":
        return byte_level_bytes, False
    steps = fields.get("decoder.decoders", list)
    if decoder != "Sequence" or steps not in (_SENTENCEPIECE_STEPS, _SENTENCEPIECE_STEPS[:-1]):
        raise UnsupportedError(
            f"{fields.file}: decoder.type {decoder} is not supported as it is here; supported: "
            "ByteLevel, and SentencePiece's Sequence (Replace, ByteFallback, Fuse, perhaps Strip)"
        )
    if fields.get("pre_tokenizer.type", str) == "Sequence":  # which may hide a Metaspace
        raise UnsupportedError(
            f"{fields.file}: pre_tokenizer.type Sequence is not supported with SentencePiece's "
            "decoder; supported: Metaspace, or none"
        )
    return sentencepiece_bytes, steps == _SENTENCEPIECE_STEPS


def _read_tokenizer(fields: _Fields) -> tuple[tokenizers.Tokenizer, int]:
    """The tokenizer of a file and the size of its vocabulary."""
    size = _vocabulary_size(fields)
    with refusing_bad_vocabulary(str(fields.file)):
        bpe = tokenizers.Tokenizer.from_str(fields.text)
        bpe.no_truncation()
        bpe.no_padding()
        bpe.encode("a")
    taken = bpe.get_added_tokens_decoder()
    for token in fields.get("added_tokens", list) or []:
        text, id = token["content"], token["id"]
        if id not in taken or taken[id].content != text:
            raise fields.wrong("added_tokens", f"gives {text!r} the id {id}, which it cannot have")
        if taken[id].special:
            bpe.add_tokens([_special(taken[id])])
    return bpe, size


def _vocabulary_size(fields: _Fields) -> int:
    """One more than the largest id, all of which are checked."""
    ids = fields.get("model.vocab", dict)
    if not ids:
        raise fields.wrong("model.vocab", "is missing or empty")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if fields.get(f"model.{affix}", str):
            raise fields.wrong(f"model.{affix}", "is set; supported: none")
    added = fields.get("added_tokens", list) or []
    for index, token in enumerate(added):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise fields.wrong(f"added_tokens[{index}]", "is not an object with a content")
    pairs = [*ids.items(), *((token["content"], token.get("id")) for token in added)]
    for token, id in pairs:
        if type(id) is not int or not 0 <= id < _MAX_ID:
            raise fields.wrong(
                "model.vocab", f"gives {token!r} the id {id!r}; ids are from 0 to {_MAX_ID - 1}"
            )
    if len(set(ids.values())) != len(ids):
        raise fields.wrong("model.vocab", "gives two tokens the same id")
    return max(id for _, id in pairs) + 1


def _named_token(config: _Fields, name: str, bpe: tokenizers.Tokenizer) -> tuple[str, int] | None:
    """The text and id of such as `bos_token`: a string, or an object with one."""
    nested = isinstance(config.get(name, object), dict)
    text = config.get(f"{name}.content" if nested else name, str)
    if text is None:
        return None
    token = bpe.token_to_id(text)
    if token is None:
        if name not in ("bos_token", "eos_token"):  # for training, and never written
            return None
        raise config.wrong(name, f"{text!r} is not in the vocabulary")
    added = bpe.get_added_tokens_decoder().get(token)
    bpe.add_tokens([_special(added or AddedToken(text))])  # whatever tokenizer.json says of it
    return text, token


def _special(token: AddedToken) -> AddedToken:
    """A token as special, and found in texts as they are written.

    In normalized text it could be found where nobody wrote it.
    """
    return AddedToken(
        token.content,
        special=True,
        normalized=False,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
    )


def _surroundings(bpe: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that tokenizer.json's post-processor puts around a text.

    It alone decides, as in `transformers` (5.23, `tokenization_utils_base.py`, `_from_pretrained`):
    add_bos_token and add_eos_token in tokenizer_config.json are of before there was tokenizer.json.
    """
    text = bpe.encode("a", add_special_tokens=False).ids
    whole = bpe.encode("a").ids
    starts = range(len(whole) - len(text), -1, -1)
    start = next(start for start in starts if whole[start : start + len(text)] == text)
    return tuple(whole[:start]), tuple(whole[start + len(text) :])


def _chat_templates(folder: Path, config: _Fields) -> dict[str, str]:
    """The templates in files of their own, or else those in a config, by name.

    As `transformers` looks for them (5.23, `tokenization_utils_base.py`, `_from_pretrained`); it
    writes chat_template.json for processors, which have some models' only template.
    """
    files = {file.stem: file for file in folder.glob("additional_chat_templates/*.jinja")}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read(file) for name, file in files.items()}
    processor = _Fields(folder / "chat_template.json", required=False)
    return _named_templates(config) or _named_templates(processor)


def _named_templates(config: _Fields) -> dict[str, str]:
    """A config's `chat_template`: one, or a list of objects with a name and a template each."""
    value = config.get("chat_template", object)
    if not isinstance(value, list):
        single = config.get("chat_template", str)
        return {} if single is None else {"default": single}
    templates = {}
    for index, named in enumerate(value):
        fields = named if isinstance(named, dict) else {}
        name, template = fields.get("name"), fields.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise config.wrong(f"chat_template[{index}]", "is not an object with name and template")
        templates[name] = template
    return templates


def _read(file: Path) -> str:
    try:
        if not file.is_file():  # opening a FIFO would wait for its writer
            fault = "is not a regular file" if file.exists() else "no such file"
            raise CheckpointError(f"{file}: {fault}")
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{file}: is larger than {_MAX_FILE_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8: {error.reason}") from None
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{file}: is a Git LFS pointer (git lfs pull fetches the file)")
    return text


def _named(value: object) -> str:
    return "null" if value is None else type(value).__name__
