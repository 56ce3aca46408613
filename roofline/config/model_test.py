import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from roofline.config import PRESETS, ModelConfig, RopeScaling
from roofline.errors import CheckpointError, UnsupportedError

SMOLLM2 = ModelConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)


SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    RopeScaling("llama3", 3.5, 2.0, 9.0, 512),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("theta", "dim"), [(10000.0, 64), (500000.0, 128), (100000.0, 80)])
def test_rope_frequencies_are_those_of_transformers_in_double_precision(
    scaling: RopeScaling | None, theta: float, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of factor 1, linear scaling is none.
    rope: dict[str, Any] = {"rope_type": "linear", "factor": 1.0, "rope_theta": theta}
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    peer = LlamaConfig(head_dim=dim, max_position_embeddings=1 << 20, rope_parameters=rope)
    monkeypatch.setattr(torch, "float", torch.float64)  # the dtype they compute in
    wanted, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](peer, torch.device("cpu"))
    model = dataclasses.replace(SMOLLM2, head_dim=dim, rope_theta=theta, rope_scaling=scaling)
    assert attention_factor == 1.0
    assert model.rope_frequencies() == pytest.approx(wanted.tolist(), rel=1e-12)


def test_rope_factors_divide_frequencies_before_scaling() -> None:
    plain = dataclasses.replace(SMOLLM2, head_dim=4)
    stretched = dataclasses.replace(
        plain, rope_factors=(1.0, 8.0), rope_scaling=RopeScaling("linear", 2.0)
    )
    first, second = plain.rope_frequencies()
    assert stretched.rope_frequencies() == [first / 2, second / 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2' is not supported; supported: llama"),
        ({"hidden_size": 0}, "hidden_size is 0; .* from 1 to"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 2.0}, "intermediate_size is 2.0"),
        ({"num_heads": 8}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": RopeScaling("linear", 0.0)}, "finite factors above 0"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 4.0, 4.0)}, "high_freq_factor above"),
        ({"rope_scaling": RopeScaling("llama3", math.nan)}, "finite factors above 0"),
        ({"rope_factors": (1.0,) * 31}, "31 rope factors for head_dim 64; it needs 32"),
        ({"rope_factors": (0.0,) * 32}, "rope factors must be finite numbers above 0"),
        ({"eos_token_ids": (49152,)}, "special token id 49152 is outside the vocabulary of 49152"),
        ({"bos_token_id": -1}, "special token id -1"),
        ({"bos_token_id": True}, "special token id True"),
    ],
)
def test_a_model_config_that_cannot_be_is_refused_by_field(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        dataclasses.replace(SMOLLM2, **changes)


def test_presets_have_the_published_numbers_of_parameters() -> None:
    billions = {"llama-110m": 0.110, "llama-3.2-1b": 1.236, "llama-3.1-8b": 8.030}
    for name, expected in (billions | {"llama-3.1-70b": 70.554}).items():
        m = PRESETS[name]
        attention = 2 * m.hidden_size * (m.query_size + m.kv_size)
        layer = attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
        tables = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
        total = m.num_layers * layer + tables + m.hidden_size
        assert total / 1e9 == pytest.approx(expected, abs=0.001), name
