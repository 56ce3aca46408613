import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from roofline.models.facts import model_facts
from tests.gguf_writer import write_gguf
from tests.llama2c_writer import random_llama, write_model
from tests.sentencepiece_model import SIZE, write_tokenizer_bin
from tests.tiny_model import CONTEXT, write_tiny_model

SHAPE = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}


def held(facts: dict[str, Any], **expected: Any) -> bool:
    return {name: facts[name] for name in expected} == expected


def test_facts_of_a_folder(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    facts = model_facts(folder)
    assert held(facts, **SHAPE, family="llama", context=CONTEXT, vocab_size=258)
    assert held(facts, dtypes=["F32"], tokenizer="byte-level BPE", chat_template=True)
    assert held(facts, eos_token_ids=[257], license=None, path=str(folder), revision=None)
    weights = folder / "model.safetensors"
    assert facts["bytes"] == weights.stat().st_size
    assert 0 < facts["bytes"] - 4 * facts["parameters"] < 10_000  # its header


def test_a_folder_without_its_weights_has_all_other_facts(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, chat=False)
    whole = model_facts(folder)
    (folder / "model.safetensors").unlink()
    assert model_facts(folder) == whole | {"dtypes": [], "bytes": 0}
    assert whole["chat_template"] is False


def test_facts_of_a_gguf_file_split_or_not(tmp_path: Path) -> None:
    model = random_llama(vocab_size=SIZE)
    facts = model_facts(write_gguf(model, tmp_path / "m.gguf", matrices="Q8_0"))
    assert held(facts, **SHAPE, dtypes=["Q8_0", "F32"], tokenizer="SentencePiece BPE")
    write_gguf(model, tmp_path / "s.gguf", matrices="Q8_0", split_max_tensors=8)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    split = model_facts(parts[0])
    same = {name: facts[name] for name in facts if name not in ("path", "bytes")}
    assert held(split, **same, bytes=sum(part.stat().st_size for part in parts))


@pytest.mark.parametrize(("layout", "dtype"), [("v0", "F32"), ("v2", "I8")])
def test_facts_of_a_llama2c_file(tmp_path: Path, layout: str, dtype: str) -> None:
    path = write_model(random_llama(vocab_size=SIZE), tmp_path / "m.bin", layout, 32)
    write_tokenizer_bin(tmp_path / "tokenizer.bin")
    facts = model_facts(path)
    assert held(facts, **SHAPE, dtypes=[dtype], bytes=path.stat().st_size, chat_template=False)


def test_a_snapshot_names_its_commit(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "snapshots" / ("a" * 40))
    assert model_facts(folder)["revision"] == "a" * 40


def test_facts_cost_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from roofline.models.facts import model_facts\n"
        "model_facts(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    folder = write_tiny_model(tmp_path)
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(folder)], check=True)
