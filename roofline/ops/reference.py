"""Every op in plain PyTorch: the definition, the fallback and the oracle. Slow and always right.

A token's bits do not depend on the other tokens of a step: linears run in zero-padded tiles of 16
tokens, attention walks fixed spans of KV in order, and no function is used whose vector and scalar
forms differ (torch.sigmoid is one; torch.exp is not).
"""

import itertools

import torch
from torch import Tensor

from roofline.ops import FloatWeight, Int8Weight, KvCache, Ops, PackedWeight, StepInputs, Weight
from roofline.ops.noise import choose
from roofline.ops.truncation import truncate

TILE_TOKENS = 16
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of the values of a KV cache
PART_COLUMNS, STRETCH_COLUMNS = 128, 32  # of activations in INT8 (csrc/int8_rounding.h)
SPAN_TOKENS = 256  # KV positions attention reads at a time, rounded down to whole blocks


class ReferenceOps(Ops):
    """Composed of torch primitives; float32 inside, whatever the activation dtype."""

    def __init__(
        self,
        dtype: torch.dtype,
        scratch: Tensor,
        *,
        int8_activations: bool = False,
        stretches: bool = False,  # each with a step of its own, as the CPU's kernels round
    ) -> None:
        super().__init__(dtype, scratch)
        self._int8_activations, self._stretches = int8_activations, stretches

    def _multiply(self, x: Tensor, weight: Weight) -> Tensor:
        """Multiply as this backend was told: by activations as they are, or rounded to INT8."""
        if self._int8_activations and isinstance(weight, Int8Weight):
            x = (round_stretches if self._stretches else round_groups)(x.float(), weight)
        return multiply(x, weight, self.scratch)

    def embed(self, token_ids: Tensor, table: Weight, first_id: int, out: Tensor) -> None:
        """See `Ops.embed`."""
        local = token_ids - first_id
        here = (local >= 0) & (local < table.rows)
        rows = local.clamp(0, table.rows - 1)
        assert not isinstance(table, PackedWeight), "packed for another backend"
        if isinstance(table, Int8Weight):
            picked = Int8Weight(table.values[rows], table.scales[rows], table.group, table.offset)
            values = dequantize(picked, torch.empty_like(picked.values, dtype=torch.float32))
        else:
            values = table.values[rows].float()
        out.copy_(values * here.unsqueeze(1))

    def norm_qkv_rope_store(
        self,
        residual: Tensor,
        delta: Tensor | None,
        norm: Tensor,
        eps: float,
        qkv: Weight,
        bias: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rope: Tensor,
        inputs: StepInputs,
        kv_cache: KvCache,
        layer: int,
        out: Tensor,
    ) -> None:
        """See `Ops.norm_qkv_rope_store`."""
        if delta is not None:
            residual += delta
        tokens, heads, dim = out.shape
        kv_heads = kv_cache.kv_heads
        x = rms_norm(residual, norm, eps).to(self.dtype)
        mixed = self._multiply(x, qkv)
        if bias is not None:
            mixed += bias
        mixed = mixed.view(tokens, heads + 2 * kv_heads, dim)
        query, key, value = mixed.split([heads, kv_heads, kv_heads], dim=1)
        # Contiguous, as the layout of `mixed` depends on the tiles and the order of sums on it.
        if q_norm is not None:
            query = rms_norm(query.contiguous(), q_norm, eps)
        if k_norm is not None:
            key = rms_norm(key.contiguous(), k_norm, eps)
        cosines, sines = rope[:, inputs.positions].unsqueeze(2)  # [T, 1, D / 2]
        out.copy_(rotate(query, cosines, sines))
        written = inputs.slots >= 0
        for half, x in enumerate((rotate(key, cosines, sines), value)):
            _store(x[written], inputs.slots[written], kv_cache, layer, half)

    def attention(
        self,
        query: Tensor,
        kv_cache: KvCache,
        layer: int,
        block_table: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """See `Ops.attention`."""
        starts, contexts = query_start.tolist(), context_len.tolist()
        for row, (start, stop) in enumerate(itertools.pairwise(starts)):
            if start < stop:
                blocks = block_table[row].long()
                scales = None if kv_cache.scales is None else kv_cache.scales[layer]
                paged = KvCache(kv_cache.values[layer], scales)
                mine = query[start:stop], contexts[row]
                out[start:stop] = _attend(*mine, paged, blocks, scale, window).to(out.dtype)

    def linear(self, x: Tensor, weight: Weight, out: Tensor) -> None:
        """See `Ops.linear`."""
        out.copy_(self._multiply(x, weight))

    def norm_gate_up_swiglu(
        self,
        residual: Tensor,
        delta: Tensor,
        norm: Tensor,
        eps: float,
        gate_up: Weight,
        out: Tensor,
    ) -> None:
        """See `Ops.norm_gate_up_swiglu`."""
        residual += delta
        x = rms_norm(residual, norm, eps).to(self.dtype)
        gate, up = self._multiply(x, gate_up).chunk(2, dim=1)
        out.copy_(gate / (1 + torch.exp(-gate)) * up)

    def norm_head(
        self,
        residual: Tensor,
        delta: Tensor,
        sampled: Tensor,
        norm: Tensor,
        eps: float,
        head: Weight,
        out: Tensor,
    ) -> None:
        """See `Ops.norm_head`."""
        x = rms_norm(residual[sampled] + delta[sampled], norm, eps).to(self.dtype)
        out.copy_(self._multiply(x, head))

    def truncate(self, logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> None:
        """See `Ops.truncate`."""
        columns = (min_p.tolist(), top_k.tolist(), top_p.tolist())
        for row, limits in zip(logits, zip(*columns, strict=True), strict=True):
            truncate(row, *limits)

    def choose(
        self, logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, out: Tensor
    ) -> None:
        """See `Ops.choose`."""
        columns = (temperature.tolist(), seed.tolist(), position.tolist())
        for row, (heat, key, place) in enumerate(zip(*columns, strict=True)):
            out[row] = choose(logits[row].cpu(), heat, key % (1 << 64), place)


def round_groups(x: Tensor, weight: Int8Weight) -> Tensor:
    """x [T, K] rounded to INT8 in the groups of a weight's columns: max |x| / 127 is a step.

    As a GPU's kernels round; which columns share a step is a backend's own choice.
    """
    columns = torch.arange(x.shape[1], device=x.device) + weight.offset
    largest = _largest(x, columns // weight.group)
    steps = torch.where(largest < SMALLEST_NORMAL, 1.0, largest / x.new_tensor(127.0))
    return (x / steps).round() * steps


def round_stretches(x: Tensor, weight: Int8Weight) -> Tensor:
    """x [T, K] rounded to INT8 in stretches of 32 columns, whose steps are multiples of a unit.

    Groups are cut into parts of 128 columns from where they begin, parts into stretches. The unit
    of a part is max |x| / (127 * 255), a step the least of 1 to 255 units that reaches its
    stretch's largest: 8 bits say a stretch's step, and sums of a part stay integers.
    """
    columns = torch.arange(x.shape[1], device=x.device)
    first = (weight.group - weight.offset) % weight.group  # column of the first whole group
    inside = torch.where(columns < first, columns, (columns - first) % weight.group)
    part = (inside % PART_COLUMNS == 0).cumsum(0) - 1
    stretch = (inside % PART_COLUMNS % STRETCH_COLUMNS == 0).cumsum(0) - 1
    unit = _largest(x, part) / x.new_tensor(127.0 * 255.0)
    unit = torch.where(unit < SMALLEST_NORMAL, 1.0, unit)
    multiple = torch.ceil(_largest(x, stretch) / (unit * 127.0)).clamp(1.0, 255.0)
    return (x / (multiple * unit)).round() * multiple * unit


def _largest(x: Tensor, run: Tensor) -> Tensor:
    """The largest |x| of the run of columns that each column is of, as large as x [T, K]."""
    runs = run - run[0]
    most = x.new_zeros(len(x), int(runs[-1]) + 1)
    return most.scatter_reduce_(1, runs.expand_as(x), x.abs(), "amax")[:, runs]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over its root mean square, times weight [H] (Zhang and Sennrich 2019), float32."""
    mean_square = x.pow(2).mean(dim=-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps) * weight


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D], halves paired (Su et al. 2021, as in GPT-NeoX)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def dequantize(weight: Int8Weight, out: Tensor) -> Tensor:
    """Write the matrix [N, K] to out, float32: values times the scale of their group."""
    out.copy_(weight.values)
    columns, group = out.shape[1], weight.group
    lead = min((group - weight.offset) % group, columns)  # columns of a first group cut short
    whole = (columns - lead) // group
    first = int(lead > 0)
    if lead:
        out[:, :lead] *= weight.scales[:, :1]
    if whole:
        groups = out[:, lead : lead + whole * group].unflatten(1, (whole, group))
        groups *= weight.scales[:, first : first + whole].unsqueeze(2)
    if lead + whole * group < columns:
        out[:, lead + whole * group :] *= weight.scales[:, first + whole :]
    return out


def multiply(x: Tensor, weight: Weight, scratch: Tensor) -> Tensor:
    """x [T, K] times the transpose of weight [N, K]: [T, N] float32, in tiles of 16 tokens.

    `scratch` is float32 of at least one row of the weight; a slab of rows is dequantised to it,
    small enough to stay in cache while every tile is multiplied by it.
    """
    assert not isinstance(weight, PackedWeight), "packed for another backend"
    tokens, columns = x.shape
    tiles = -(-tokens // TILE_TOKENS)
    padded = scratch.new_zeros(tiles, TILE_TOKENS, columns)
    padded.view(-1, columns)[:tokens] = x
    result = scratch.new_empty(tiles, weight.rows, TILE_TOKENS)
    slab = scratch.numel() // columns
    for start in range(0, weight.rows, slab):
        stop = min(start + slab, weight.rows)
        matrix = scratch[: (stop - start) * columns].view(stop - start, columns)
        _float_rows(weight, start, stop, matrix)
        for tile in range(tiles):
            torch.mm(matrix, padded[tile].t(), out=result[tile, start:stop])
    return result.transpose(1, 2).reshape(-1, weight.rows)[:tokens]


def _float_rows(weight: Int8Weight | FloatWeight, start: int, stop: int, out: Tensor) -> None:
    if isinstance(weight, FloatWeight):
        out.copy_(weight.values[start:stop])
        return
    rows = slice(start, stop)
    part = Int8Weight(weight.values[rows], weight.scales[rows], weight.group, weight.offset)
    dequantize(part, out)


def _store(x: Tensor, slots: Tensor, kv_cache: KvCache, layer: int, half: int) -> None:
    """Write keys or values [n, Hkv, D] float32 to their slots, as the cache holds them."""
    values, size = kv_cache.values, kv_cache.block_tokens
    at = slots // size, slice(None), slots % size
    if kv_cache.scales is not None:
        largest = LARGEST[values.dtype]
        scale = x.abs().amax(dim=2) / x.new_tensor(largest)  # as `int8_groups` divides
        scale = torch.where(scale < SMALLEST_NORMAL, 1.0, scale)
        kv_cache.scales[layer, half][at] = scale
        x = (x / scale.unsqueeze(2)).clamp(-largest, largest)
        x = x.round() if values.dtype == torch.int8 else x
    values[layer, half][at] = x.to(values.dtype)


def _attend(
    query: Tensor,  # [n, Hq, D], the last n tokens of the context
    context: int,
    paged: KvCache,  # of one layer: [2, blocks, Hkv, block_tokens, D]
    blocks: Tensor,  # [B] int64
    scale: float,
    window: int | None,
) -> Tensor:
    """Online softmax over spans of KV (Dao et al. 2022), [n, Hq, D] float32."""
    tokens, heads, dim = query.shape
    kv_heads, block_tokens = paged.values.shape[2:4]
    tiles, group = -(-tokens // TILE_TOKENS), heads // kv_heads
    padded = query.new_zeros(tiles * TILE_TOKENS, heads, dim, dtype=torch.float32)
    padded[:tokens] = query
    # [tiles * Hkv, group * 16, D]: the query heads of a KV head share its keys
    shape = (tiles, TILE_TOKENS, kv_heads, group, dim)
    rows = padded.view(shape).permute(0, 2, 3, 1, 4).reshape(tiles * kv_heads, -1, dim)
    position = torch.arange(tiles * TILE_TOKENS, device=query.device) + (context - tokens)
    position = position.view(tiles, 1, 1, TILE_TOKENS, 1)

    highest = rows.new_full((*rows.shape[:2], 1), -torch.inf)
    total, mixed = torch.zeros_like(highest), torch.zeros_like(rows)
    span_blocks = max(1, SPAN_TOKENS // block_tokens)
    for first in range(0, -(-context // block_tokens), span_blocks):
        keys, values, place = _span(paged, blocks, first, span_blocks, context)
        keys, values = (kv.expand(tiles, -1, -1, -1).flatten(0, 1) for kv in (keys, values))
        scores = torch.bmm(rows, keys.transpose(1, 2)) * scale
        seen = place <= position
        if window is not None:
            seen &= place > position - window
        seen = seen.expand(tiles, kv_heads, group, TILE_TOKENS, -1).reshape(scores.shape)
        scores.masked_fill_(~seen, -torch.inf)
        higher = torch.maximum(highest, scores.amax(dim=2, keepdim=True))
        finite = higher.clamp(min=torch.finfo(torch.float32).min)  # a span may be all masked
        weights, keep = torch.exp(scores - finite), torch.exp(highest - finite)
        total = total * keep + weights.sum(dim=2, keepdim=True)
        mixed = mixed * keep + torch.bmm(weights, values)
        highest = higher
    attended = (mixed / total).view(tiles, kv_heads, group, TILE_TOKENS, dim)
    return attended.permute(0, 3, 1, 2, 4).reshape(-1, heads, dim)[:tokens]


def _span(
    paged: KvCache, blocks: Tensor, first: int, span_blocks: int, context: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [1, Hkv, span, D] float32 of a span of blocks, and its positions [span].

    Always the same shape: past the table block 0 stands in, and values past the context are zero.
    """
    block_tokens = paged.values.shape[3]
    chosen = blocks.new_zeros(span_blocks)
    listed = blocks[first : first + span_blocks]
    chosen[: len(listed)] = listed
    both = paged.values[:, chosen].float()
    if paged.scales is not None:
        both *= paged.scales[:, chosen].unsqueeze(-1)
    keys, values = both.transpose(2, 1).flatten(2, 3).unsqueeze(1)
    place = torch.arange(span_blocks * block_tokens, device=blocks.device) + first * block_tokens
    values.masked_fill_((place >= context).view(1, 1, -1, 1), 0.0)
    return keys, values, place
