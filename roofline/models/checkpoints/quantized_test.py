import dataclasses
import errno
import json
import os
import resource
import shutil
import stat
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tokenizers
import torch
from safetensors import safe_open
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from roofline.budget import Rank, plan_model
from roofline.config import ModelConfig, WeightFormat
from roofline.errors import CapacityError, CheckpointError, RooflineError, UsageError
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.checkpoints.quantized import write_quantized
from roofline.models.checkpoints.safetensors_folder import SINGLE, SafetensorsCheckpoint
from roofline.models.checkpoints.tensors import EMBEDDING, matrix_shapes, tensor_shapes
from roofline.models.decoder import Decoder
from roofline.models.layers import Source
from roofline.models.opening import OpenedModel
from roofline.parallel.mesh import Mesh
from roofline.tokenizer import Tokenizer

SIZES: list[Literal["auto", "channel"] | int] = ["auto", 32, 64, 128, 256, "channel"]
CONFIG = ModelConfig(
    hidden_size=144,
    intermediate_size=200,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=24,
    vocab_size=70,
    max_position=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)


def silent(_: str) -> None:
    """Progress that nobody watches."""


def write(checkpoint: Checkpoint, folder: Path, weights: WeightFormat | None = None) -> None:
    write_quantized(OpenedModel(checkpoint), folder, weights or WeightFormat(), silent)


def loaded(checkpoint: Checkpoint, weights: WeightFormat) -> dict[str, Tensor]:
    """Every weight of the one rank that loads the checkpoint."""
    plan = plan_model(checkpoint.config, weights, Rank(), checkpoint.native_groups)
    decoder = Decoder(checkpoint.config, plan, Mesh.single(), Source(checkpoint, silent))
    return dict(decoder.tensors())


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def float_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that transformers saved in bfloat16; no width is a multiple of 128."""
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=144,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=70,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_offline_has_the_bits_of_quantising_at_load(
    float_folder: Path, tmp_path: Path, size: Any
) -> None:
    weights = WeightFormat(group_size=size)
    checkpoint = SafetensorsCheckpoint(float_folder)
    write(checkpoint, tmp_path / "out", weights)
    written = SafetensorsCheckpoint(tmp_path / "out")
    assert written.config == checkpoint.config
    at_load = loaded(checkpoint, weights)
    for again in (weights, WeightFormat()):
        assert_same_bits(loaded(written, again), at_load)


def test_gguf_offline_is_the_model_that_quantising_at_load_gives(
    smollm2_path: Path, tmp_path: Path
) -> None:
    checkpoint = GGUFCheckpoint(smollm2_path)
    tokenizer = Tokenizer.from_gguf(checkpoint.metadata, str(smollm2_path))
    write_quantized(OpenedModel(checkpoint, tokenizer), tmp_path / "out", WeightFormat(), silent)
    assert_same_tokenizer(Tokenizer.from_folder(tmp_path / "out"), tokenizer)
    written = SafetensorsCheckpoint(tmp_path / "out")
    assert written.config == checkpoint.config
    assert written.native_groups[EMBEDDING] == 32  # Q8_0 keeps its own
    assert set(written.native_groups.values()) == {32, 128}
    assert_same_bits(loaded(written, WeightFormat()), loaded(checkpoint, WeightFormat()))


def assert_same_tokenizer(found: Tokenizer, wanted: Tokenizer) -> None:
    for text in (
        "What is the capital of France?",
        "a  1 23\n\té😀中",
        "<|im_start|>user<|im_end|>",
    ):
        for special in (True, False):
            assert found.encode(text, parse_special=special) == wanted.encode(
                text, parse_special=special
            )
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    assert found.apply_chat_template(messages) == wanted.apply_chat_template(messages)
    for name in ("vocab_size", "bos_token_id", "eos_token_ids", "adds_bos", "special_ids"):
        assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize("bos_tokens", [0, 1, 2])
@pytest.mark.parametrize("eos_tokens", [0, 1])
def test_tokenizer_of_a_folder_is_saved_with_the_ids_it_puts_around_a_text(
    tmp_path: Path, bos_tokens: int, eos_tokens: int
) -> None:
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    bpe = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(
        single=["<s>"] * bos_tokens + ["$A"] + ["</s>"] * eos_tokens,
        special_tokens=[("<s>", 256), ("</s>", 257)],
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    assert_saved_as_it_was(Tokenizer.from_folder(tmp_path), tmp_path)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_tokenizer_of_a_gguf_is_saved_with_the_ids_it_puts_around_a_text(
    smollm2_path: Path, tmp_path: Path, adds_bos: bool, adds_eos: bool
) -> None:
    checkpoint = GGUFCheckpoint(smollm2_path)
    adds = {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}
    tokenizer = Tokenizer.from_gguf({**checkpoint.metadata, **adds}, "x.gguf")
    assert len(tokenizer.encode("a")) == 1 + adds_bos + adds_eos
    assert_saved_as_it_was(tokenizer, tmp_path)


def assert_saved_as_it_was(tokenizer: Tokenizer, folder: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    checkpoint = DummyCheckpoint(config, 0)
    write_quantized(OpenedModel(checkpoint, tokenizer), folder / "out", WeightFormat(), silent)
    again = Tokenizer.from_folder(folder / "out")
    for text in ("a b", ""):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.eos_token_ids == tokenizer.eos_token_ids
    assert SafetensorsCheckpoint(folder / "out").config.eos_token_ids == tokenizer.eos_token_ids


def test_int8_of_a_file_is_requantised_only_when_a_size_is_stated(tmp_path: Path) -> None:
    checkpoint = DummyCheckpoint(CONFIG, 0)
    for size in SIZES:
        weights = WeightFormat(group_size=size)
        write(checkpoint, tmp_path / str(size), weights)
        written = SafetensorsCheckpoint(tmp_path / str(size))
        assert_same_bits(loaded(written, WeightFormat()), loaded(checkpoint, weights))
    own = np.asarray(checkpoint.read_int8(EMBEDDING)[0])
    kept = SafetensorsCheckpoint(tmp_path / "auto").read_int8(EMBEDDING)[0]
    remade = SafetensorsCheckpoint(tmp_path / "64").read_int8(EMBEDDING)[0]
    assert np.array_equal(kept.numpy(), own)
    assert not np.array_equal(remade.numpy(), own)


def test_files_are_as_documented(tmp_path: Path) -> None:
    write(DummyCheckpoint(CONFIG, 0), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", SINGLE]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "roofline",
        "bits": 8,
        "group_size": 128,
        "symmetric": True,
    }
    found = {}
    with safe_open(tmp_path / "out" / SINGLE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_slice(name)
            found[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    shapes = matrix_shapes(CONFIG)
    scales = {f"{name}_scale": ("F32", (n, -(-k // 128))) for name, (n, k) in shapes.items()}
    floats = {name: ("F32", s) for name, s in tensor_shapes(CONFIG).items() if name not in shapes}
    assert found == {name: ("I8", shape) for name, shape in shapes.items()} | scales | floats


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    write(DummyCheckpoint(CONFIG, 0), tmp_path / "out")
    raw = (tmp_path / "out" / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for entry in json.loads(raw[8 : 8 + length]).values():
        if entry.get("dtype") == "F32":
            assert entry["data_offsets"][0] % 4 == 0


def test_tied_model_has_one_table_on_disk(float_folder: Path, tmp_path: Path) -> None:
    write(SafetensorsCheckpoint(float_folder), tmp_path / "out")
    written = SafetensorsCheckpoint(tmp_path / "out")
    assert ("lm_head.weight" in written.native_groups) is not written.config.tie_word_embeddings


def test_progress_hears_of_every_tensor_once(tmp_path: Path) -> None:
    heard: list[str] = []
    checkpoint = DummyCheckpoint(CONFIG, 0)
    write_quantized(OpenedModel(checkpoint), tmp_path / "out", WeightFormat(), heard.append)
    assert sorted(heard) == sorted(tensor_shapes(CONFIG))


def test_folder_has_the_permissions_of_any_new_one(tmp_path: Path) -> None:
    write(DummyCheckpoint(CONFIG, 0), tmp_path / "out")
    (tmp_path / "other").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "other")]
    assert modes[0] == modes[1]


class Watched:
    """`Checkpoint` of random floats that counts how many of its tensors are alive at once."""

    def __init__(self, spoil: Callable[[str, Tensor], None]) -> None:
        self.config, self.native_groups = CONFIG, dict[str, int]()
        self._shapes, self._spoil = tensor_shapes(CONFIG), spoil
        self._given: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def read(self, name: str) -> Tensor:
        tensor = torch.rand(self._shapes[name]) + 0.5
        self._spoil(name, tensor)
        self._given.append(weakref.ref(tensor))
        self.most_alive = max(self.most_alive, sum(given() is not None for given in self._given))
        return tensor

    def read_int8(self, name: str) -> tuple[Tensor, Tensor]:
        return torch.ones(self._shapes[name], dtype=torch.int8), torch.full((200, 7), -1.0)

    def close(self) -> None:
        """Nothing is open."""


def fine(name: str, tensor: Tensor) -> None:
    """Leave a tensor as it is."""


def test_one_float_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    checkpoint = Watched(fine)
    write(checkpoint, tmp_path / "out")
    assert checkpoint.most_alive == 1


def assert_refused(
    checkpoint: Checkpoint, folder: Path, kind: type[RooflineError], says: str
) -> None:
    """Refused in one line, and nothing is left in the folder's folder."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(kind) as caught:
        write(checkpoint, folder)
    assert says in caught.value.message and "\n" not in caught.value.message
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weight_that_is_no_number_leaves_nothing_behind(
    tmp_path: Path, name: str, bad: float
) -> None:
    def spoil(which: str, tensor: Tensor) -> None:
        if which == name:
            tensor[-1] = bad

    says = f"tensor '{name}' holds NaN or infinity"
    assert_refused(Watched(spoil), tmp_path / "out", CheckpointError, says)


def test_scales_that_could_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    checkpoint = Watched(fine)
    checkpoint.native_groups["model.layers.0.mlp.down_proj.weight"] = 32
    says = "tensor 'model.layers.0.mlp.down_proj.weight': its scales holds -1.0"
    assert_refused(checkpoint, tmp_path / "out", CheckpointError, says)


def test_existing_output_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        assert_refused(Watched(fine), tmp_path / name, UsageError, "exists already")
    assert (tmp_path / "file").read_text() == "mine"


def test_output_needs_a_folder_to_be_in(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        write(Watched(fine), tmp_path / "absent" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        write(Watched(fine), tmp_path / "file" / "out")


def test_floats_are_no_quantised_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantization 'none' cannot be written"):
        write(Watched(fine), tmp_path / "out", WeightFormat(quantization="none"))


def test_disk_without_room_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Watched(fine), tmp_path / "whole")
    needed = (tmp_path / "whole" / SINGLE).stat().st_size
    lacking = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: lacking)
    checkpoint = Watched(fine)
    says = f"takes {needed:,} bytes of disk, but {needed - 1:,} are free"
    assert_refused(checkpoint, tmp_path / "out", CapacityError, says)
    assert checkpoint.most_alive == 0


def test_file_the_system_lets_grow_no_further_leaves_nothing_behind(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        says = "could not be written to the end (File too large"
        assert_refused(Watched(fine), tmp_path / "out", CapacityError, says)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_on_the_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(Watched(fine), tmp_path / "out", CapacityError, os.strerror(number))


def test_other_errors_of_the_disk_are_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    says = "cannot be written: Input/output error"
    assert_refused(Watched(fine), tmp_path / "out", UsageError, says)


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        if name.endswith("down_proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_quantized(OpenedModel(Watched(fine)), tmp_path / "out", WeightFormat(), interrupt)
    assert list(tmp_path.iterdir()) == []
