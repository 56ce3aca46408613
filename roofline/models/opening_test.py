import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from roofline.config import PRESETS, EngineConfig, WeightFormat
from roofline.errors import CheckpointError, RooflineError, UnsupportedError, UsageError
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.checkpoints.llama2c import Llama2cCheckpoint
from roofline.models.checkpoints.safetensors_folder import SINGLE, SafetensorsCheckpoint
from roofline.models.checkpoints.tensors import EMBEDDING
from roofline.models.opening import OpenedModel, describe, open_model
from tests import sentencepiece_model
from tests.gguf_writer import write_gguf
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


def opened_as(reference: Path | str, **options: Any) -> OpenedModel:
    return open_model(str(reference), EngineConfig(**options))


def refusal(reference: Path | str, **options: Any) -> RooflineError:
    with pytest.raises(RooflineError) as caught:
        opened_as(reference, **options)
    assert "\n" not in caught.value.message
    return caught.value


def test_folder_opens_with_its_tokenizer(folder: Path) -> None:
    opened = opened_as(folder)
    assert isinstance(opened.checkpoint, SafetensorsCheckpoint)
    assert opened.tokenizer is not None
    assert opened.tokenizer.decode(opened.tokenizer.encode("hello")) == "hello"


def test_gguf_opens_with_its_tokenizer(smollm2_path: Path) -> None:
    opened = opened_as(smollm2_path)
    assert isinstance(opened.checkpoint, GGUFCheckpoint)
    assert opened.tokenizer is not None
    assert opened.tokenizer.vocab_size == opened.checkpoint.config.vocab_size
    opened.checkpoint.close()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_dummy_without_tokenizer(name: str) -> None:
    opened = opened_as(name, load_format="dummy", seed=7)
    assert isinstance(opened.checkpoint, DummyCheckpoint)
    assert (opened.checkpoint.config, opened.tokenizer) == (PRESETS[name], None)


def test_seed_makes_the_dummy_weights() -> None:
    one, again, other = (
        opened_as("llama-110m", load_format="dummy", seed=seed).checkpoint for seed in (1, 1, 2)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    values = one.read_int8(name)[0]
    assert np.array_equal(values, again.read_int8(name)[0])
    assert not np.array_equal(values, other.read_int8(name)[0])


def test_dummy_of_a_folder_needs_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    opened = opened_as(folder, load_format="dummy")
    assert isinstance(opened.checkpoint, DummyCheckpoint)
    assert opened.checkpoint.config.vocab_size == 260
    assert opened.tokenizer is not None
    (folder / "tokenizer.json").unlink()
    assert opened_as(folder, load_format="dummy").tokenizer is None


def test_dummy_of_a_file_keeps_its_shape_and_tokenizer(smollm2_path: Path) -> None:
    opened = opened_as(smollm2_path, load_format="dummy")
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
def test_folder_with_a_config_and_a_model_in_one_file_is_told_to_name_the_file(
    folder: Path, name: str
) -> None:
    (folder / SINGLE).unlink()
    (folder / "tokenizer.bin").write_bytes(b"anything")
    (folder / "training_args.bin").write_bytes(b"PK\x03\x04")
    (folder / name).write_bytes(b"\x80\x02\0\0")  # 640, a size of llama2.c's
    error = refusal(folder)
    assert isinstance(error, UsageError)
    assert f"neither {SINGLE} nor " in error.message
    assert f"name it: {folder / name}" in error.message
    (folder / name).unlink()
    assert "'training_args.bin' is a pickle" in refusal(folder).message


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
        opened = opened_as(llama2c)
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
    opened = opened_as(llama2c, load_format="dummy")
    assert isinstance(opened.checkpoint, DummyCheckpoint)
    assert opened.tokenizer is None
    assert describe(str(llama2c))[0] == opened.checkpoint.config


def test_tokenizer_bin_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_model(random_llama(vocab_size=400), tmp_path / "stories.bin", "v0")
    sentencepiece_model.write_tokenizer_bin(tmp_path / "tokenizer.bin")
    assert "the tokenizer has 600 tokens, but the embedding 400 rows" in refusal(path).message


@pytest.fixture
def tokenizers_path(tmp_path: Path) -> Path:
    """The SentencePiece tokenizer of the tests in each file that --tokenizer takes."""
    path = tmp_path / "tokenizers"
    sentencepiece_model.write_tokenizer_json(path, "metaspace", chat_template="{{ 'x' }}")
    sentencepiece_model.write_tokenizer_bin(path / "tokenizer.bin")
    write_gguf(random_llama(vocab_size=sentencepiece_model.SIZE), path / "model.gguf")
    return path


@pytest.mark.parametrize("name", [".", "tokenizer.json", "tokenizer.bin", "model.gguf"])
def test_a_named_tokenizer_goes_before_the_models_own(
    llama2c: Path, tokenizers_path: Path, name: str
) -> None:
    llama2c.with_name("tokenizer.bin").write_bytes(b"no tokenizer at all")
    named = str(tokenizers_path / name)
    for reference, load_format in (
        (llama2c, "auto"),
        (llama2c, "dummy"),
        ("llama-110m", "dummy"),
    ):
        tokenizer = opened_as(reference, tokenizer=named, load_format=load_format).tokenizer
        assert tokenizer is not None and tokenizer.vocab_size == sentencepiece_model.SIZE
        assert tokenizer.decode(tokenizer.encode("the river")) == "the river"
    assert "tokenizer.bin: " in refusal(llama2c).message


def test_a_split_gguf_gives_its_tokenizer_whichever_part_is_named(tmp_path: Path) -> None:
    model = random_llama(vocab_size=sentencepiece_model.SIZE)
    write_gguf(model, tmp_path / "m.gguf", split_max_tensors=8)
    for part in sorted(tmp_path.glob("m-*")):
        assert opened_as(part).tokenizer is not None
        assert opened_as("llama-110m", load_format="dummy", tokenizer=str(part)).tokenizer


def test_a_tokenizer_that_does_not_fit_or_is_none_is_refused_by_name(
    folder: Path, tokenizers_path: Path, llama2c: Path
) -> None:
    path = tokenizers_path / "tokenizer.bin"
    assert refusal(folder, tokenizer=str(path)).message == (
        f"tokenizer {path}: the tokenizer has 600 tokens, but the embedding 260 rows"
    )
    (empty := folder / "empty").mkdir()
    for name, problem in {
        str(folder / "absent"): "no such file or folder; give a folder with a tokenizer.json, ",
        "x" * 999: "cannot be read: File name too long; give a folder",
        "a\0b": "no such file or folder; give",
        str(folder / "config.json"): "no file of that name is known; give a folder",
        str(llama2c.parent / "stories.bin"): "stories.bin: token ",
        str(empty): "tokenizer.json: no such file",
    }.items():
        for reference in ("llama-110m", folder):
            assert problem in refusal(reference, load_format="dummy", tokenizer=name).message


def test_a_named_template_goes_before_the_models_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("own {{ messages[0].content }}")
    for template in ("own {{ messages[0].content }}", str(tmp_path / "own.jinja")):
        tokenizer = opened_as(folder, chat_template=template).tokenizer
        assert tokenizer is not None
        assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "own x"


def test_a_template_without_a_tokenizer_or_that_cannot_be_compiled_is_refused(
    folder: Path,
) -> None:
    error = refusal("llama-110m", load_format="dummy", chat_template="{{ x }}")
    assert error.message.startswith("chat_template needs a tokenizer")
    assert "chat template: line 1: " in refusal(folder, chat_template="{% if %}").message
    assert "no such file or folder; give" in refusal(folder, chat_template="absent").message


def test_generation_config_gives_ends_and_sampling_of_its_own(folder: Path, tmp_path: Path) -> None:
    opened = opened_as(folder)
    assert opened.config.eos_token_ids == (2,)  # transformers wrote it into both files
    own = {"eos_token_id": [7, 2], "top_p": 0.5, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(own))
    other = tmp_path / "other" / "generation_config.json"
    other.parent.mkdir()
    other.write_text('{"eos_token_id": 9, "min_p": 0.25}')
    expected: list[tuple[str, tuple[int, ...], dict[str, float]]] = [
        ("auto", (2, 7), {"temperature": 0.0, "top_p": 0.5}),
        ("none", (2,), {}),
        (str(other), (2, 9), {"min_p": 0.25}),
        (str(other.parent), (2, 9), {"min_p": 0.25}),
    ]
    for asked, ends, sampling in expected:
        for load_format in ("auto", "dummy"):
            opened = opened_as(folder, generation_config=asked, load_format=load_format)
            assert (opened.config.eos_token_ids, opened.sampling_defaults) == (ends, sampling)
    opened = opened_as("llama-110m", load_format="dummy", generation_config=str(other))
    assert opened.config.eos_token_ids == (9,)


def test_a_bad_generation_config_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"eos_token_id": 260}')
    assert f"{bad}: eos_token_id is 260" in refusal(folder, generation_config=str(bad)).message
    absent = str(tmp_path / "absent.json")
    assert "absent.json': no such file" in refusal(folder, generation_config=absent).message
    (folder / "generation_config.json").write_text('{"top_p": 7}')
    assert "generation_config.json: top_p is 7" in refusal(folder).message
    assert opened_as(folder, generation_config="none").sampling_defaults == {}


def test_every_end_that_a_file_or_the_tokenizer_names_is_kept_once(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ALPHABET[4]}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 2, 4]}')
    assert opened_as(folder).config.eos_token_ids == (2, 9, 4)


def test_sampling_of_a_gguf_is_read_and_can_be_done_without(tmp_path: Path) -> None:
    model = random_llama(vocab_size=sentencepiece_model.SIZE)
    floats = {"general.sampling.temp": 0.5}
    path = write_gguf(model, tmp_path / "m.gguf", floats=floats)
    assert opened_as(path).sampling_defaults == {"temperature": 0.5}
    assert opened_as(path, load_format="dummy").sampling_defaults == {"temperature": 0.5}
    assert opened_as(path, generation_config="none").sampling_defaults == {}


def test_rotary_order_is_that_of_the_user_in_a_bin_and_refused_elsewhere(
    folder: Path, llama2c: Path, tmp_path: Path
) -> None:
    sentencepiece_model.write_tokenizer_bin(tmp_path / "tokenizer.bin")
    name = "model.layers.0.self_attn.q_proj.weight"
    usual, same, other = (
        opened_as(llama2c, rotary_order=order).checkpoint.read(name)
        for order in ("auto", "interleaved", "half-split")
    )
    assert np.array_equal(usual, same) and not np.array_equal(usual, other)
    gguf_path = write_gguf(random_llama(vocab_size=sentencepiece_model.SIZE), tmp_path / "m.gguf")
    for reference, load_format in (
        (folder, "auto"),
        (gguf_path, "auto"),
        (llama2c, "dummy"),
        ("llama-110m", "dummy"),
    ):
        error = refusal(reference, load_format=load_format, rotary_order="half-split")
        assert isinstance(error, UsageError)
        assert "rotary_order half-split is for the weights of a .bin file" in error.message


@pytest.mark.parametrize(
    ("kind", "grows"), [("Q4_0", True), ("Q5_1", True), ("Q8_0", False), ("F16", False)]
)
def test_a_file_that_takes_less_than_int8_says_so(tmp_path: Path, kind: str, grows: bool) -> None:
    model = random_llama(vocab_size=sentencepiece_model.SIZE, intermediate_size=128)
    path = write_gguf(model, tmp_path / "m.gguf", matrices=kind)
    opened = opened_as(path)
    line = opened.growth(WeightFormat())
    assert (line is not None) == grows
    assert opened.growth(WeightFormat("none")) is None  # floats, as was asked for
    if line is not None:
        weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
        file = weights * {"Q4_0": 18, "Q5_1": 24}[kind] / 32e6
        assert f"m.gguf: {file:.1f} MB of weights in the file ({kind}) take" in line
        assert f" take {weights * (1 + 4 / 64) / 1e6:.1f} MB in memory: " in line
    assert opened_as(path, load_format="dummy").growth(WeightFormat()) is None


def test_folders_and_bins_never_take_less_than_int8(folder: Path, llama2c: Path) -> None:
    sentencepiece_model.write_tokenizer_bin(llama2c.with_name("tokenizer.bin"))
    for reference in (folder, llama2c):
        assert opened_as(reference).growth(WeightFormat()) is None


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
    error = refusal(folder, load_format=load_format)
    assert isinstance(error, CheckpointError)
    assert "the tokenizer has 256 tokens, but the embedding 200 rows" in error.message


def test_described_model_is_the_opened_one(folder: Path, smollm2_path: Path) -> None:
    for path in (folder, smollm2_path):
        checkpoint = opened_as(path).checkpoint
        assert describe(str(path)) == (checkpoint.config, checkpoint.native_groups)
        checkpoint.close()
    assert describe(str(smollm2_path))[1] == {EMBEDDING: 32}
    assert describe("llama-110m") == (PRESETS["llama-110m"], {})


def test_describing_needs_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert describe(str(folder))[0].vocab_size == 260


def test_unknown_reference_names_the_nearest(tmp_path: Path) -> None:
    for look in (describe, opened_as):
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
