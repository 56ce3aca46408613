"""Who owns which KV blocks, and which full ones can serve another request: ids only, no bytes.

A block is free (its content means nothing), used (owned by one request or shared by several), or
cached (unowned, but its content is known by digest, so it may be shared again or evicted). Every
operation is O(1) a block and deterministic: the same calls give the same ids.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """The blocks of one KV pool.

    A digest is a keyed hash over a block's tokens and the digest of the block before it, so equal
    digests mean equal prefixes, and nobody without the secret can build a collision.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, *, enable_prefix_caching: bool, secret: bytes
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self._secret = secret
        self._owners = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to evict first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without an owner whose content may be shared again."""
        return len(self._cached)

    def num_available(self, keep: Iterable[int] = ()) -> int:
        """Count the blocks `allocate` could give if those in `keep` were shared first."""
        return len(self._free) + len(self._cached) - sum(not self._owners[b] for b in keep)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one owner each; the longest unused cached ones come last."""
        assert count <= self.num_available(), f"{count} blocks asked, {self.num_available()} there"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of the blocks that `lookup` found."""
        for block in blocks:
            if not self._owners[block]:
                del self._cached[block]
            self._owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take an owner from each block of a request's table.

        The tail goes first, and so is evicted first: a prefix without its head is of no use.
        """
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def extend_chain(self, chain: list[bytes], tokens: Sequence[int], num_blocks: int) -> None:
        """Append digests of the blocks of `tokens` until `chain` has `num_blocks` of them."""
        if not self.enable_prefix_caching or num_blocks <= len(chain):
            return
        size = self.block_tokens
        digest = chain[-1] if chain else b""
        for start in range(len(chain) * size, num_blocks * size, size):
            content = array("i", tokens[start : start + size]).tobytes()
            digest = hashlib.blake2b(digest + content, digest_size=32, key=self._secret).digest()
            chain.append(digest)

    def lookup(self, chain: Sequence[bytes]) -> list[int]:
        """Find the blocks that hold the longest possible prefix of `chain`; takes none of them."""
        blocks = []
        for digest in chain:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Offer a full block for sharing; of two with the same content the first stays the one."""
        assert self._owners[block], f"block {block} is published without an owner"
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self) -> None:
        """Take every block out of the prefix cache; unowned ones become free."""
        self._free += self._cached
        self._cached.clear()
        self._block_of.clear()
        self._digest_of.clear()

    def digest(self, block: int) -> bytes | None:
        """Return what the prefix cache knows the block by."""
        return self._digest_of.get(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the pool's invariants, given the block table of every owner."""
        owners: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), f"a block twice in one table: {table}"
            owners.update(table)
        used = {block for block, count in enumerate(self._owners) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & used or cached & used), "a block has two states"
        assert free | cached | used == set(range(self.num_blocks)), "a block is lost"
        assert {block: self._owners[block] for block in used} == dict(owners), "owners miscounted"
        assert cached <= self._digest_of.keys(), "a cached block has no digest"
        assert not free & self._digest_of.keys(), "a free block has a digest"
        assert {d: b for b, d in self._digest_of.items()} == self._block_of, "digests disagree"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block
