"""What a step tells a device, in one copy: which numbers lie where. No torch here.

The layout is a function of the step's sizes alone, so a captured step finds its own again.
"""

from collections.abc import Mapping

# What the host writes for a step: kept there, and on a GPU uploaded.
HOST_BUFFERS = (
    "token_ids", "positions", "slots", "query_start", "context_len", "sampled", "temperature",
    "seed", "choice_position", "min_p", "top_k", "top_p", "chosen", "step",
)  # fmt: skip
_ALIGNMENT = 64  # bytes
_ITEM_BYTES = {"int32": 4, "float32": 4, "int64": 8, "float64": 8}


Layout = Mapping[str, tuple[int, int, str]]  # of each field: first byte, items, dtype


def upload_layout(tokens: int, sampled: int, rows: int, new_blocks: int) -> Layout:
    """The fields of a step's upload, one after the other: name -> (first byte, items, dtype)."""
    counts = {
        "query_start": (rows + 1, "int32"),
        "context_len": (rows, "int32"),
        "token_ids": (tokens, "int64"),  # -1: the last token of its row
        "token_rows": (tokens, "int64"),
        "positions": (tokens, "int64"),
        "slots": (tokens, "int64"),
        "sampled": (sampled, "int64"),
        "temperature": (sampled, "float64"),
        "seed": (sampled, "int64"),
        "choice_position": (sampled, "int64"),
        "choice_rows": (sampled, "int64"),
        "min_p": (sampled, "float32"),
        "top_k": (sampled, "int64"),
        "top_p": (sampled, "float64"),
        "divisor": (sampled, "float32"),  # of logits, before they are truncated
        "block_places": (new_blocks, "int64"),  # in the block table, flat
        "block_ids": (new_blocks, "int32"),
    }
    layout: dict[str, tuple[int, int, str]] = {}
    start = 0
    for name, (count, dtype) in counts.items():
        layout[name] = start, count, dtype
        start += -(-count * _ITEM_BYTES[dtype] // _ALIGNMENT) * _ALIGNMENT
    return layout


def upload_bytes(layout: Layout) -> int:
    """Bytes of an upload."""
    start, count, dtype = layout["block_ids"]
    return start + -(-count * _ITEM_BYTES[dtype] // _ALIGNMENT) * _ALIGNMENT
