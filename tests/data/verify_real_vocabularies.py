"""Hold Roofline's ids against the originals' on real vocabularies.

    pip download --no-deps -d ARCHIVES llama-models mistral-common dashscope
    pip download --no-deps -d ARCHIVES --no-binary :all: llama-cpp-python
    pip install tiktoken sentencepiece
    python -m tests.data.verify_real_vocabularies ARCHIVES TEXT [SMOLLM2.gguf]

The archives hold the vocabularies of Llama 3, Mistral and Qwen as their authors give them away, and
GGUF files of llama.cpp's converter with the ids that `transformers` gave. Encoded are the hard
strings, texts joined of them, and the first 200 kB of TEXT. Nothing in an archive is run.
docs/tokenizers.md has the outcome.
"""

import ast
import base64
import hashlib
import json
import re
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import sentencepiece
import tiktoken  # pyrefly: ignore[missing-import]

from roofline.models.checkpoints.gguf import GGUFFile
from roofline.tokenizer.tokenizer import Tokenizer
from tests.hard_strings import HARD_STRINGS
from tests.original_rules import (
    LLAMA3,
    QWEN2,
    RULES,
    TEKKEN,
    by_pair,
    bytes_of,
    merged,
    merges_of,
    printable,
)

TEXT_BYTES = 200_000
N_JOINED = 5_000
Encode = Callable[[str], list[int]]


def main() -> None:
    """Verify what lies in a folder of archives."""
    archives = Archives(Path(sys.argv[1]))
    text = Path(sys.argv[2]).read_bytes()[:TEXT_BYTES].decode(errors="ignore")
    random = Random(0)
    joined = ["".join(random.choices(HARD_STRINGS, k=5)) for _ in range(N_JOINED)]
    texts = [*HARD_STRINGS, *joined, text]
    checks = Checks(archives, texts)
    llama3 = ranks(archives.read("llama_models-*", "llama_models/llama3/tokenizer.model"))
    qwen = ranks(archives.read("dashscope-*", "dashscope/resources/qwen.tiktoken"))
    archives.must_hold("llama_models-*", "llama_models/llama3/tokenizer.py", LLAMA3)
    archives.must_hold("dashscope-*", "dashscope/tokenizers/qwen_tokenizer.py", QWEN2)
    gpt2 = checks.gguf("gpt-2", "gpt-2", None)
    llama_bpe = checks.gguf("llama-bpe", "llama-bpe", tiktokens(llama3, LLAMA3))
    qwen2 = checks.gguf("qwen2", "qwen2", tiktokens(qwen, QWEN2, composes=True))
    checks.gguf("llama-spm", None, None)
    for name in ("tekken_240718", "tekken_240911"):
        tekken = checks.tekken(f"mistral_common/data/{name}.json")
    for name in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"):
        checks.sentencepiece(f"mistral_common/data/{name}")
    smollm = {"smollm": metadata_of(Path(sys.argv[3]))} if len(sys.argv) > 3 else {}
    checks.names({**gpt2, **llama_bpe, **qwen2, **tekken, **smollm})


class Archives:
    """Wheels and source distributions in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, archive: str, member: str) -> bytes:
        """The bytes of a member of the archive whose name fits; of a tar, at any depth."""
        path = next(path for path in sorted(self._folder.iterdir()) if fnmatch(path.name, archive))
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(member)
        with tarfile.open(path) as source:
            name = next(name for name in source.getnames() if name.endswith(f"/{member}"))
            file = source.extractfile(name)
            assert file is not None
            return file.read()

    def must_hold(self, archive: str, member: str, pattern: str) -> None:
        """Be sure that our copy of a published pattern is one."""
        if pattern not in self.read(archive, member).decode():
            raise SystemExit(f"{member} does not hold the pattern {pattern}")


class Checks:
    """One method for each kind of vocabulary; each prints a line."""

    def __init__(self, archives: Archives, texts: list[str]) -> None:
        self._archives = archives
        self._texts = texts

    def gguf(self, name: str, pre: str | None, original: Encode | None) -> dict[str, Any]:
        """A file of llama.cpp's converter: the ids of `transformers`, and those of the original."""
        member = f"ggml-vocab-{name}.gguf"
        data = self._member(member)
        with TemporaryDirectory() as folder:
            path = Path(folder, member)
            path.write_bytes(data)
            metadata = metadata_of(path)
        assert metadata.get("tokenizer.ggml.pre") == (pre or "default")
        tokenizer = Tokenizer.from_gguf(metadata, member)
        inputs = self._member(f"{member}.inp").decode().split("\n__ggml_vocab_test__\n")
        outputs = self._member(f"{member}.out").decode().split("\n")
        table = dict(zip(inputs, outputs, strict=False))
        expected = {text: [*map(int, ids.split())] for text, ids in table.items() if text}
        self._compare(f"{member}, transformers", data, tokenizer, expected.__getitem__, [*expected])
        if name == "gpt-2":
            original = by_plain_python(metadata, "gpt-2")
        if original is not None:
            self._compare(f"{member}, original", data, tokenizer, original, self._texts)
        return {} if pre is None else {pre: metadata}

    def tekken(self, member: str) -> dict[str, Any]:
        """Mistral's vocabulary, its merges written as converters write them."""
        data = self._archives.read("mistral_common-*", member)
        document = json.loads(data)
        config = document["config"]
        assert config["pattern"] == TEKKEN
        n_special = config["default_num_special_tokens"]
        entries = document["vocab"][: config["default_vocab_size"] - n_special]
        vocabulary = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
        tokens = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{id}>" for id in range(3, n_special))]
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "tekken",
            "tokenizer.ggml.tokens": [*tokens, *map(printable, vocabulary)],
            "tokenizer.ggml.token_type": np.repeat(
                np.array([3, 1], np.int32), [n_special, len(vocabulary)]
            ),
            "tokenizer.ggml.merges": [" ".join(map(printable, m)) for m in merges_of(vocabulary)],
            "tokenizer.ggml.bos_token_id": 1,
        }
        original = tiktokens(vocabulary, TEKKEN, first_id=n_special)
        tokenizer = Tokenizer.from_gguf(metadata, member)
        self._compare(f"{member}, original", data, tokenizer, original, self._texts)
        return {"tekken": metadata}

    def sentencepiece(self, member: str) -> None:
        """A SentencePiece model, as llama.cpp's converter writes it."""
        data = self._archives.read("mistral_common-*", member)
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        ids = range(model.vocab_size())
        types = [
            2
            if model.is_unknown(id)
            else 3
            if model.is_control(id)
            else 6
            if model.is_byte(id)
            else 1
            for id in ids
        ]
        metadata = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
            "tokenizer.ggml.scores": np.array([model.get_score(id) for id in ids], np.float32),
            "tokenizer.ggml.token_type": np.array(types, np.int32),
        }
        tokenizer = Tokenizer.from_gguf(metadata, member)
        self._compare(f"{member}, sentencepiece", data, tokenizer, model.encode, self._texts)

    def names(self, known: dict[str, Any]) -> None:
        """The hash by which the converter tells a pre-tokenizer, from our ids of its text."""
        code = self._archives.read("llama_cpp_python-*", "conversion/base.py").decode()
        (text,) = re.findall(r"^ +chktxt = ('.*')$", code, re.MULTILINE)
        found = re.findall(r'if chkhsh == "(\w+)":\n.*\n +res = "(.*)"', code)
        alike = {"smaug-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2", "pixtral": "tekken"}
        for name in [*known, *alike]:
            metadata = known[alike.get(name, name)] | {"tokenizer.ggml.pre": name}
            if name == "deepseek-r1-qwen":
                metadata["tokenizer.ggml.bos_token_id"] = 151_646
            tokenizer = Tokenizer.from_gguf(metadata, name)
            ids = tokenizer.encode(ast.literal_eval(text), add_special_tokens=name != "pixtral")
            digest = hashlib.sha256(str(ids).encode()).hexdigest()
            verdict = "equal" if (digest, name) in found else "DIFFERENT"
            print(f"{name}: {verdict} to the hash of llama.cpp's converter, {digest[:16]}")

    def _member(self, name: str) -> bytes:
        return self._archives.read("llama_cpp_python-*", f"models/{name}")

    @staticmethod
    def _compare(
        what: str, data: bytes, tokenizer: Tokenizer, original: Encode, texts: list[str]
    ) -> None:
        n_ids = 0
        wrong = list[str]()
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            n_ids += len(ids)
            if ids != original(text):
                wrong.append(text)
            back = (text, unicodedata.normalize("NFC", text), text.replace("\u2581", " "))
            if tokenizer.decode(ids) not in back:
                wrong.append(f"decoded: {text}")
        verdict = f"DIFFERENT on {[text[:40] for text in wrong]}" if wrong else "equal"
        digest = hashlib.sha256(data).hexdigest()
        print(f"{what} (sha256 {digest[:16]}): {len(texts)} texts, {n_ids} ids, {verdict}")


def metadata_of(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer and its model."""
    with GGUFFile(path) as file:
        return dict(file.metadata)


def ranks(data: bytes) -> dict[bytes, int]:
    """A vocabulary as tiktoken writes it: a line for each token, with its id."""
    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def tiktokens(
    vocabulary: dict[bytes, int], pattern: str, *, composes: bool = False, first_id: int = 0
) -> Encode:
    """The ids that `tiktoken` gives, as the models' own code calls it."""
    encoding = tiktoken.Encoding(
        "original", pat_str=pattern, mergeable_ranks=vocabulary, special_tokens={}
    )

    def encode(text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if composes else text
        return [first_id + id for id in encoding.encode_ordinary(text)]

    return encode


def by_plain_python(metadata: dict[str, Any], rule: str) -> Encode:
    """The ids that the rule gives with a file's merges."""
    ids = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    pairs = (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])
    rank = by_pair([(bytes_of(left), bytes_of(right)) for left, right in pairs])

    @cache
    def word_ids(word: str) -> list[int]:
        return [ids[printable(piece)] for piece in merged(word.encode(), rank)]

    return lambda text: [id for word in RULES[rule].words(text) for id in word_ids(word)]


if __name__ == "__main__":
    main()
