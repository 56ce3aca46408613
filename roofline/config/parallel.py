"""How many ranks share a model, and which heads, channels, layers and tokens each of them holds."""

import dataclasses

from roofline.config.model import ModelConfig
from roofline.errors import UsageError, shown

UNIT = 64  # FFN channels and vocabulary are dealt to ranks in units of this many


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How many ranks share a model, and what each of them holds.

    Tensor parallel: KV heads are dealt first; with more ranks than KV heads the ranks are dealt
    over the heads, and those sharing one split its query heads. FFN channels and vocabulary are
    dealt in units of 64. Pipeline parallel: stages are runs of layers. Any counts work.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 1024:
                raise UsageError(f"{name} is {shown(value)}; it must be an integer from 1 to 1024")

    def check(self, model: ModelConfig) -> None:
        """Refuse a split that would leave a rank without work."""
        tp, most = self.tensor_parallel_size, self.most_tensor_ranks(model)
        if tp > most:
            raise UsageError(
                f"tensor_parallel_size {tp} is too many for this model; the most is {most}"
            )
        if self.pipeline_parallel_size > model.num_layers:
            raise UsageError(
                f"pipeline_parallel_size {self.pipeline_parallel_size} is more than the model's "
                f"{model.num_layers} layers"
            )

    @staticmethod
    def most_tensor_ranks(model: ModelConfig) -> int:
        """The largest tensor parallel size that leaves no rank without work."""
        units = min(-(-model.intermediate_size // UNIT), -(-model.vocab_size // UNIT))
        return min(model.num_heads, units)

    def kv_heads(self, model: ModelConfig, tp_rank: int) -> range:
        """The KV heads a rank stores."""
        ranks, heads = self.tensor_parallel_size, model.num_kv_heads
        if ranks <= heads:
            return deal(heads, ranks, tp_rank)
        head, _, _ = self._sharers(model, tp_rank)
        return range(head, head + 1)

    def query_heads(self, model: ModelConfig, tp_rank: int) -> range:
        """The query heads a rank computes; all of them belong to its `kv_heads`."""
        if self.tensor_parallel_size <= model.num_kv_heads:
            kv = self.kv_heads(model, tp_rank)
            return range(kv.start * model.group_query, kv.stop * model.group_query)
        head, sharers, place = self._sharers(model, tp_rank)
        mine = deal(model.group_query, sharers, place)
        first = head * model.group_query
        return range(first + mine.start, first + mine.stop)

    def ffn_channels(self, model: ModelConfig, tp_rank: int) -> range:
        """The FFN channels a rank computes."""
        return deal_units(model.intermediate_size, self.tensor_parallel_size, tp_rank)

    def vocabulary(self, model: ModelConfig, tp_rank: int) -> range:
        """The token ids whose embedding and head rows a rank holds."""
        return deal_units(model.vocab_size, self.tensor_parallel_size, tp_rank)

    def layers(self, model: ModelConfig, stage: int) -> range:
        """The layers of a pipeline stage."""
        return deal(model.num_layers, self.pipeline_parallel_size, stage)

    def _sharers(self, model: ModelConfig, tp_rank: int) -> tuple[int, int, int]:
        """(KV head, ranks sharing it, this rank's place among them), for more ranks than heads."""
        for head in range(model.num_kv_heads):
            ranks = deal(self.tensor_parallel_size, model.num_kv_heads, head)
            if tp_rank in ranks:
                return head, len(ranks), tp_rank - ranks.start
        raise UsageError(f"tensor parallel rank {tp_rank} is not below {self.tensor_parallel_size}")


def deal(items: int, hands: int, hand: int) -> range:
    """The contiguous share of one hand of items dealt evenly; the first hands get the rest."""
    each, rest = divmod(items, hands)
    start = hand * each + min(hand, rest)
    return range(start, start + each + (hand < rest))


def deal_units(channels: int, hands: int, hand: int) -> range:
    """Like `deal`, in units of 64 channels; the last unit may be short."""
    units = deal(-(-channels // UNIT), hands, hand)
    return range(units.start * UNIT, min(units.stop * UNIT, channels))
