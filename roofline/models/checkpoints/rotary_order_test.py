import numpy as np

from roofline.config import PRESETS
from roofline.models.checkpoints.rotary_order import half_split, rotary_heads


def test_pairs_of_a_head_come_to_lie_half_a_head_apart() -> None:
    rows = np.arange(12)[:, None] * [1, 10]  # [2 heads of 6, 2]
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert half_split(rows, 2).tolist() == [[row, 10 * row] for row in expected]


def test_heads_of_q_and_of_k_rotate_and_nothing_else() -> None:
    model = PRESETS["llama-3.2-1b"]
    heads = rotary_heads(model)
    assert len(heads) == 2 * model.num_layers
    assert heads["model.layers.3.self_attn.q_proj.weight"] == model.num_heads
    assert heads["model.layers.3.self_attn.k_proj.weight"] == model.num_kv_heads
