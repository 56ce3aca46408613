"""Which tensors a model has, under Hugging Face's names, and their shapes."""

from roofline.budget import layer_tensor
from roofline.config import ModelConfig

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every matrix [N, K], in the order a step reads them; a tied model has no head of its own."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    pieces = {
        "self_attn.q_proj": (config.query_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.query_size),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {layer_tensor(layer, piece): shape for piece, shape in pieces.items()}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def norm_names(config: ModelConfig) -> list[str]:
    """Every RMSNorm weight [hidden_size]."""
    names = ("input_layernorm", "post_attention_layernorm")
    layers = range(config.num_layers)
    return [layer_tensor(layer, name) for layer in layers for name in names] + [NORM]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint must hold."""
    norms = dict.fromkeys(norm_names(config), (config.hidden_size,))
    return {**matrix_shapes(config), **norms}
