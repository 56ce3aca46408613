"""Which tensors a model has, under Hugging Face's names, and their shapes."""

from roofline.budget import QKV, layer_tensor
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


def vector_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Every RMSNorm weight and every bias, [n]."""
    hidden, head = config.hidden_size, config.head_dim
    pieces = {("input_layernorm", "weight"): hidden, ("post_attention_layernorm", "weight"): hidden}
    if config.qkv_bias:
        sizes = (config.query_size, config.kv_size, config.kv_size)
        pieces |= {(name, "bias"): size for name, size in zip(QKV, sizes, strict=True)}
    if config.qk_norm:
        pieces |= {("self_attn.q_norm", "weight"): head, ("self_attn.k_norm", "weight"): head}
    shapes = {
        layer_tensor(layer, name, kind): (size,)
        for layer in range(config.num_layers)
        for (name, kind), size in pieces.items()
    }
    return shapes | {NORM: (hidden,)}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint must hold."""
    return {**matrix_shapes(config), **vector_shapes(config)}
