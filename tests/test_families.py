"""Every family against transformers: logits, greedy tokens, INT8, and GGUF files of the same."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from roofline import LLM, SamplingParams
from roofline.config import EngineConfig, WeightFormat
from roofline.models.checkpoints import Checkpoint
from roofline.models.checkpoints.gguf_checkpoint import GGUFCheckpoint
from roofline.models.checkpoints.quantized import write_quantized
from roofline.models.checkpoints.safetensors_folder import SafetensorsCheckpoint
from roofline.models.checkpoints.tensors import HEAD, matrix_shapes, tensor_shapes
from roofline.models.families import FAMILIES, Family
from roofline.models.opening import OpenedModel
from tests.whole_model import WholeModel

ROOT = Path(__file__).parents[1]
FLOATS: dict[str, Any] = {"quantization": "none", "dtype": "float32"}
INT8: dict[str, Any] = {"quantization": "int8", "dtype": "float32"}
SWITCHED_ON = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name: model_type, what its config says
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Mistral, window": ("mistral", {"sliding_window": 24}),
    "Mistral, null window, wide heads, tied": (
        "mistral",
        {"sliding_window": None, "head_dim": 48, "tie_word_embeddings": True},
    ),
    "Qwen2": ("qwen2", {}),
    "Qwen2, window, tied": ("qwen2", {**SWITCHED_ON, "tie_word_embeddings": True}),
    "Qwen3, tied": ("qwen3", {"head_dim": 48, "tie_word_embeddings": True}),
    "Qwen3, window": ("qwen3", {**SWITCHED_ON, "head_dim": 64}),
}
over_models = pytest.mark.parametrize(("kind", "says"), MODELS.values(), ids=MODELS)


@over_models
@torch.inference_mode()
def test_logits_and_greedy_tokens_are_those_of_transformers(
    kind: str, says: dict[str, Any], tmp_path: Path
) -> None:
    peer = random_model(tmp_path, FAMILIES[kind], says)
    assert_same_logits(SafetensorsCheckpoint(tmp_path), FLOATS, peer)
    prompts = [torch.randint(0, 256, (length,)).tolist() for length in (2, 40)]
    asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(tmp_path), max_num_batched_tokens=32, **FLOATS) as llm:
        for answer in llm.generate(prompts, asked):
            ids = answer.prompt_token_ids + answer.outputs[0].token_ids
            best = peer(torch.tensor([ids])).logits[0].argmax(-1).tolist()
            assert ids[len(answer.prompt_token_ids) :] == best[-9:-1]


@over_models
@torch.inference_mode()
def test_int8_logits_are_those_of_the_dequantised_weights(
    kind: str, says: dict[str, Any], tmp_path: Path
) -> None:
    peer = random_model(tmp_path, FAMILIES[kind], says)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    write_quantized(OpenedModel(checkpoint), tmp_path / "int8", WeightFormat(), lambda name: None)
    written = SafetensorsCheckpoint(tmp_path / "int8")
    assert dataclasses.replace(written.config, eos_token_ids=()) == dataclasses.replace(
        checkpoint.config, eos_token_ids=()
    )
    assert written.native_groups.keys() == matrix_shapes(written.config).keys()
    peer.load_state_dict(
        {name: written.read(name) for name in tensor_shapes(written.config)}, False
    )
    assert_same_logits(checkpoint, INT8, peer)
    assert_same_logits(written, INT8, peer)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("kind", "window"), [("llama", None), ("mistral", 24), ("qwen2", None), ("qwen3", None)]
)
@torch.inference_mode()
def test_gguf_gives_the_logits_of_the_same_checkpoint(
    kind: str, window: int | None, tied: bool, tmp_path: Path
) -> None:
    says = {"tie_word_embeddings": tied, "head_dim": 48}
    says |= {"sliding_window": window} if kind == "mistral" else {}
    says |= {"head_dim": 32} if kind == "qwen2" else {}
    family = FAMILIES[kind]
    peer = random_model(tmp_path, family, says)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "model.gguf", family, peer))
    assert (checkpoint.config.architecture, checkpoint.config.sliding_window) == (kind, window)
    assert_same_logits(checkpoint, FLOATS, peer)


@torch.inference_mode()
def test_the_line_that_the_documentation_adds_runs_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "add_a_model.md").read_text()
    (line,) = re.findall(r"^    (Family\(.*\)),$", text, re.MULTILINE)
    family: Family = eval(line, {"Family": Family})
    assert family.model_type not in FAMILIES
    monkeypatch.setitem(FAMILIES, family.model_type, family)
    peer = random_model(tmp_path, family, {"head_dim": 48})
    assert_same_logits(SafetensorsCheckpoint(tmp_path), FLOATS, peer)


def test_the_readme_lists_every_family() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line[:3] == "| `"]
    listed = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in rows]
    assert [names for names in listed if names and names[0] in FAMILIES] == [
        [family.model_type] for family in FAMILIES.values()
    ]


def random_model(folder: Path, family: Family, says: dict[str, Any]) -> Any:
    """A small model of a family, saved by transformers with a tokenizer of bytes.

    Its norms and biases are random too: as transformers makes them, they would do nothing.
    """
    config = getattr(transformers, family.transformers_class.replace("ForCausalLM", "Config"))(
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
        initializer_range=0.1,
        **says,
    )
    torch.manual_seed(1)
    model = getattr(transformers, family.transformers_class)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            low = -0.5 if name.endswith(".bias") else 0.5
            torch.nn.init.uniform_(parameter, low, low + 1)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def assert_same_logits(checkpoint: Checkpoint, options: dict[str, Any], peer: Any) -> None:
    """At every position of a sequence longer than the window, within 1e-4."""
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(5)).tolist()
    ours = WholeModel(checkpoint, EngineConfig(max_model_len=128, max_num_seqs=1, **options))
    theirs = peer(torch.tensor([ids])).logits[0]
    assert theirs.std() > 0.1, "the model says something"
    assert (ours.logits(ids) - theirs).abs().max() < 1e-4


def write_gguf(path: Path, family: Family, peer: Any) -> Path:
    """The model as llama.cpp's converter writes it: its names, and its row order for Llama."""
    config, architecture = peer.config, str(family.gguf)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)
    model = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(model, config.num_hidden_layers)
    for name, tensor in peer.state_dict().items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        values: np.ndarray = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = values.reshape(-1, 2, head_dim // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)  # LlamaModel.permute
        writer.add_tensor(str(names.get_name(name, (".weight", ".bias"))), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
