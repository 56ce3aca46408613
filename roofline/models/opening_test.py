import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from roofline.config import PRESETS
from roofline.errors import CheckpointError, RooflineError, UnsupportedError, UsageError
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.checkpoints.llama2c import Llama2cCheckpoint
from roofline.models.checkpoints.safetensors_folder import SINGLE, SafetensorsCheckpoint
from roofline.models.checkpoints.tensors import EMBEDDING
from roofline.models.opening import describe, open_model
from tests import sentencepiece_model
from tests.llama2c_writer import random_llama, write_model

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random model of 260 tokens with a tokenizer of 256, as transformers saves them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=260,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    vocabulary = {character: index for index, character in enumerate(ALPHABET)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def refusal(reference: Path | str, load_format: str = "auto") -> RooflineError:
    with pytest.raises(RooflineError) as caught:
        open_model(str(reference), load_format, 0)
    assert "\n" not in caught.value.message
    return caught.value


def test_folder_opens_with_its_tokenizer(folder: Path) -> None:
    opened = open_model(str(folder), "auto", 0)
    assert isinstance(opened.checkpoint, SafetensorsCheckpoint)
    assert opened.tokenizer is not None
    assert opened.tokenizer.decode(opened.tokenizer.encode("hello")) == "hello"


def test_gguf_opens_with_its_tokenizer(smollm2_path: Path) -> None:
    opened = open_model(str(smollm2_path), "auto", 0)
    assert isinstance(opened.checkpoint, GGUFCheckpoint)
    assert opened.tokenizer is not None
    assert opened.tokenizer.vocab_size == opened.checkpoint.config.vocab_size
    opened.checkpoint.close()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_dummy_without_tokenizer(name: str) -> None:
    opened = open_model(name, "dummy", 7)
    assert isinstance(opened.checkpoint, DummyCheckpoint)
    assert (opened.checkpoint.config, opened.tokenizer) == (PRESETS[name], None)


def test_seed_makes_the_dummy_weights() -> None:
    one, again, other = (open_model("llama-110m", "dummy", seed).checkpoint for seed in (1, 1, 2))
    name = "model.layers.0.self_attn.q_proj.weight"
    values = one.read_int8(name)[0]
    assert np.array_equal(values, again.read_int8(name)[0])
    assert not np.array_equal(values, other.read_int8(name)[0])


def test_dummy_of_a_folder_needs_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    opened = open_model(str(folder), "dummy", 0)
    assert isinstance(opened.checkpoint, DummyCheckpoint)
    assert opened.checkpoint.config.vocab_size == 260
    assert opened.tokenizer is not None
    (folder / "tokenizer.json").unlink()
    assert open_model(str(folder), "dummy", 0).tokenizer is None


def test_dummy_of_a_file_keeps_its_shape_and_tokenizer(smollm2_path: Path) -> None:
    opened = open_model(str(smollm2_path), "dummy", 0)
    assert isinstance(opened.checkpoint, DummyCheckpoint)
    assert opened.checkpoint.config.num_layers == 30
    assert opened.tokenizer is not None


def test_preset_without_weights_says_how_to_run_it() -> None:
    error = refusal("llama-3.1-8b")
    assert isinstance(error, UsageError)
    assert "--load-format dummy" in error.message


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_part_of_a_model_is_told_to_name_the_folder(folder: Path, name: str) -> None:
    error = refusal(folder / name)
    assert isinstance(error, UsageError)
    assert f"name the folder that holds it: {folder}" in error.message


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "x.ckpt", "x.pkl"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "was_loaded"
    bomb = b"\x80\x04cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    (tmp_path / name).write_bytes(bomb)
    error = refusal(tmp_path / name)
    assert isinstance(error, UnsupportedError)
    assert "a pickle can run code" in error.message
    assert not marker.exists()


@pytest.mark.parametrize("name", ["some.gguf", "stories.bin"])
def test_folder_of_a_model_in_one_file_is_told_to_name_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(b"")
    (tmp_path / name).write_bytes(b"GGUF")
    error = refusal(tmp_path)
    assert isinstance(error, UsageError)
    assert f"name it: {tmp_path / name}" in error.message


@pytest.fixture
def llama2c(tmp_path: Path) -> Path:
    """A random model in a .bin file, without its tokenizer."""
    model = random_llama(vocab_size=sentencepiece_model.SIZE)
    return write_model(model, tmp_path / "stories.bin", "v2", 32)


def test_llama2c_opens_with_the_tokenizer_beside_it(llama2c: Path, tmp_path: Path) -> None:
    sentencepiece_model.write_tokenizer_json(tmp_path, "metaspace", chat_template="{{ 'x' }}")
    for name, template in {"tokenizer.json": True, "tokenizer.bin": False}.items():
        if name == "tokenizer.bin":  # the file's own
            sentencepiece_model.write_tokenizer_bin(tmp_path / name)
        opened = open_model(str(llama2c), "auto", 0)
        assert isinstance(opened.checkpoint, Llama2cCheckpoint)
        assert opened.tokenizer is not None
        assert (opened.tokenizer.chat_template is not None) == template
        assert opened.tokenizer.decode(opened.tokenizer.encode("the river")) == "the river"
        assert describe(str(llama2c)) == (opened.checkpoint.config, opened.checkpoint.native_groups)
        opened.checkpoint.close()


def test_llama2c_without_tokenizer_names_the_file_it_needs(llama2c: Path) -> None:
    error = refusal(llama2c)
    assert isinstance(error, UsageError)
    assert "holds no tokenizer; put its tokenizer.bin (or tokenizer.json) into" in error.message
    opened = open_model(str(llama2c), "dummy", 0)
    assert isinstance(opened.checkpoint, DummyCheckpoint)
    assert opened.tokenizer is None
    assert describe(str(llama2c))[0] == opened.checkpoint.config


def test_tokenizer_bin_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_model(random_llama(vocab_size=400), tmp_path / "stories.bin", "v0")
    sentencepiece_model.write_tokenizer_bin(tmp_path / "tokenizer.bin")
    assert "the tokenizer has 600 tokens, but the embedding 400 rows" in refusal(path).message


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello, this is no model at all")
    assert "notes.txt" in refusal(tmp_path / "notes.txt").message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE])
def test_missing_part_of_a_folder_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = refusal(folder)
    assert isinstance(error, CheckpointError)
    assert name in error.message


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_tokenizer_with_more_tokens_than_the_embedding_is_refused(
    folder: Path, load_format: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    error = refusal(folder, load_format)
    assert isinstance(error, CheckpointError)
    assert "the tokenizer has 256 tokens, but the embedding 200 rows" in error.message


def test_described_model_is_the_opened_one(folder: Path, smollm2_path: Path) -> None:
    for path in (folder, smollm2_path):
        checkpoint = open_model(str(path), "auto", 0).checkpoint
        assert describe(str(path)) == (checkpoint.config, checkpoint.native_groups)
        checkpoint.close()
    assert describe(str(smollm2_path))[1] == {EMBEDDING: 32}
    assert describe("llama-110m") == (PRESETS["llama-110m"], {})


def test_describing_needs_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert describe(str(folder))[0].vocab_size == 260


def test_unknown_reference_names_the_nearest(tmp_path: Path) -> None:
    for look in (describe, lambda name: open_model(name, "auto", 0)):
        with pytest.raises(UsageError, match="did you mean 'llama-110m'"):
            look("llama-110")


def test_describing_imports_no_torch(folder: Path, llama2c: Path, smollm2_path: Path) -> None:
    code = (
        "import sys; from roofline.models.opening import describe\n"
        "for reference in sys.argv[1:]: describe(reference)\n"
        "sys.exit('torch' in sys.modules)"
    )
    references = [str(folder), str(llama2c), str(smollm2_path), "llama-3.1-70b"]
    command = [sys.executable, "-W", "error", "-c", code, *references]
    subprocess.run(command, check=True)
