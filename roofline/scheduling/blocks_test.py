import random
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from roofline.scheduling.blocks import BlockPool

SIZE = 2  # tokens a block
Tokens = tuple[int, ...]


def pool_of(num_blocks: int, enable_prefix_caching: bool = True) -> BlockPool:
    return BlockPool(
        num_blocks, SIZE, enable_prefix_caching=enable_prefix_caching, secret=b"secret"
    )


def chain_of(pool: BlockPool, tokens: Sequence[int]) -> list[bytes]:
    chain: list[bytes] = []
    pool.extend_chain(chain, tokens, len(tokens) // SIZE)
    return chain


def hold(pool: BlockPool, tokens: Tokens) -> list[int]:
    """Do what a request does: share what is there, take the rest, publish every full block."""
    chain = chain_of(pool, tokens)
    shared = pool.lookup(chain)
    pool.share(shared)
    table = shared + pool.allocate(-(-len(tokens) // SIZE) - len(shared))
    for block, digest in zip(table, chain, strict=False):
        pool.publish(block, digest)
    return table


class Oracle:
    """The pool by brute force: whole prefixes instead of digests, lists searched end to end."""

    def __init__(self, num_blocks: int) -> None:
        self.tables: list[list[int]] = []
        self.free = list(reversed(range(num_blocks)))
        self.cached: list[int] = []
        self.content: dict[int, Tokens] = {}

    def find(self, tokens: Tokens) -> list[int]:
        found: list[int] = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            holders = [b for b, content in self.content.items() if content == tokens[:end]]
            if not holders:
                break
            assert len(holders) == 1
            found += holders
        return found

    def available(self, keep: Sequence[int] = ()) -> int:
        return len(self.free) + sum(block not in keep for block in self.cached)

    def take(self, tokens: Tokens) -> list[int]:
        table = self.find(tokens)
        self.cached = [block for block in self.cached if block not in table]
        while len(table) * SIZE < len(tokens):
            if not self.free:
                evicted = self.cached.pop(0)
                del self.content[evicted]
                self.free.append(evicted)
            table.append(self.free.pop())
        for index, block in enumerate(table):
            self.publish(
                block, tokens[: (index + 1) * SIZE], full=(index + 1) * SIZE <= len(tokens)
            )
        self.tables.append(table)
        return table

    def publish(self, block: int, prefix: Tokens, full: bool) -> None:
        if full and prefix not in self.content.values() and block not in self.content:
            self.content[block] = prefix

    def release(self, index: int) -> None:
        for block in reversed(self.tables.pop(index)):
            if not any(block in table for table in self.tables):
                (self.cached if block in self.content else self.free).append(block)


class BlockPoolMachine(RuleBasedStateMachine):
    """Random requests come and go; every id the pool gives is the one the oracle foretells."""

    num_blocks = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(self.num_blocks)
        self.oracle = Oracle(self.num_blocks)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4 * SIZE).map(tuple))
    def add(self, tokens: Tokens) -> None:
        found = self.oracle.find(tokens)
        assert self.pool.lookup(chain_of(self.pool, tokens)) == found
        available = self.oracle.available(keep=found)
        assert self.pool.num_available(keep=found) == available
        if -(-len(tokens) // SIZE) - len(found) <= available:
            assert hold(self.pool, tokens) == self.oracle.take(tokens)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=SIZE, max_size=4 * SIZE).map(tuple))
    def add_without_reading_the_cache(self, tokens: Tokens) -> None:
        """Compute content that may be known already, as prompt_logprobs must."""
        count = -(-len(tokens) // SIZE)
        if count > self.oracle.available():
            return
        table = self.pool.allocate(count)
        for block, digest in zip(table, chain_of(self.pool, tokens), strict=False):
            self.pool.publish(block, digest)
        self.oracle.take((9,) * len(tokens))  # content nobody looks for
        for block in table:
            self.oracle.content.pop(block, None)
        for end in range(SIZE, len(tokens) + 1, SIZE):
            self.oracle.publish(table[end // SIZE - 1], tokens[:end], full=True)
        assert table == self.oracle.tables[-1]

    @precondition(lambda self: self.oracle.tables)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.oracle.tables) - 1))
        self.pool.release(self.oracle.tables[index])
        self.oracle.release(index)

    @invariant()
    def sums_and_owners_are_exact(self) -> None:
        self.pool.check(self.oracle.tables)
        assert self.pool.num_used == len({b for table in self.oracle.tables for b in table})
        assert self.pool.num_cached == len(self.oracle.cached)
        assert self.pool.num_available() == self.oracle.available()

    def teardown(self) -> None:
        while self.oracle.tables:
            self.pool.release(self.oracle.tables[0])
            self.oracle.release(0)
        self.pool.check([])
        assert self.pool.num_used == 0


TestBlockPoolAgainstBruteForce = BlockPoolMachine.TestCase
TestBlockPoolAgainstBruteForce.settings = settings(
    max_examples=100, stateful_step_count=100, deadline=None, derandomize=True
)


def test_the_pool_is_exact_after_ten_thousand_random_events() -> None:
    chance = random.Random(0)
    machine = BlockPoolMachine()
    for _ in range(10_000):
        if machine.oracle.tables and chance.random() < 0.5:
            index = chance.randrange(len(machine.oracle.tables))
            machine.pool.release(machine.oracle.tables[index])
            machine.oracle.release(index)
        else:
            machine.add(tuple(chance.choices((0, 1), k=chance.randint(1, 4 * SIZE))))
        machine.sums_and_owners_are_exact()
    machine.teardown()


def test_blocks_come_in_order_of_id() -> None:
    assert pool_of(4).allocate(3) == [0, 1, 2]


def test_the_same_calls_give_the_same_ids_whatever_the_secret() -> None:
    def walk(secret: bytes) -> list[list[int]]:
        chance = random.Random(1)
        pool = BlockPool(16, SIZE, enable_prefix_caching=True, secret=secret)
        given: list[list[int]] = []
        alive: list[list[int]] = []
        for _ in range(500):
            if alive and (pool.num_available() < 4 or chance.random() < 0.4):
                pool.release(alive.pop(chance.randrange(len(alive))))
            else:
                alive.append(hold(pool, tuple(chance.choices((0, 1), k=chance.randint(1, 8)))))
                given.append(alive[-1])
        return given

    assert walk(b"one") == walk(b"another")


def test_a_prefix_is_shared_in_whole_blocks_and_only_while_it_is_the_same_from_the_start() -> None:
    pool = pool_of(8)
    table = hold(pool, (1, 2, 3, 4, 5))
    assert pool.lookup(chain_of(pool, (1, 2, 3, 4, 5, 6))) == table[:2]
    assert pool.lookup(chain_of(pool, (1, 2, 9, 4))) == table[:1]
    assert pool.lookup(chain_of(pool, (3, 4))) == []
    assert pool.lookup(chain_of(pool, (9, 2, 3, 4))) == []


def test_the_tail_of_an_unused_prefix_is_evicted_before_its_head() -> None:
    pool = pool_of(3)
    tokens = (1, 2, 3, 4, 5, 6)
    table = hold(pool, tokens)
    pool.release(table)
    pool.allocate(1)
    assert pool.lookup(chain_of(pool, tokens)) == table[:2]


def test_the_longest_unused_prefix_is_evicted_first() -> None:
    pool = pool_of(2)
    old, young = hold(pool, (1, 1)), hold(pool, (2, 2))
    pool.release(old)
    pool.release(young)
    pool.release(hold(pool, (1, 1)))  # used again: the younger of the two now
    pool.allocate(1)
    assert pool.lookup(chain_of(pool, (1, 1))) == old
    assert pool.lookup(chain_of(pool, (2, 2))) == []


def test_a_block_in_use_is_never_evicted() -> None:
    pool = pool_of(2)
    kept = hold(pool, (1, 1))
    other = hold(pool, (2, 2))
    pool.release(other)
    assert pool.allocate(1) == other
    assert pool.num_available() == 0
    with pytest.raises(AssertionError, match="1 blocks asked, 0 there"):
        pool.allocate(1)
    assert pool.lookup(chain_of(pool, (1, 1))) == kept


def test_without_prefix_caching_nothing_is_hashed_found_or_kept() -> None:
    pool = pool_of(4, enable_prefix_caching=False)
    table = hold(pool, (1, 2, 3, 4))
    assert chain_of(pool, (1, 2)) == []
    pool.release(table)
    assert (pool.num_used, pool.num_cached) == (0, 0)


def test_digests_differ_under_another_secret_and_hash_each_token_at_its_place() -> None:
    one = BlockPool(1, SIZE, enable_prefix_caching=True, secret=b"one")
    two = BlockPool(1, SIZE, enable_prefix_caching=True, secret=b"two")
    assert chain_of(one, (1, 2)) != chain_of(two, (1, 2))
    contents = [(a, b) for a in (0, 1, 256, 65_536) for b in (0, 1, 256, 65_536)]
    assert len({chain_of(one, content)[0] for content in contents}) == len(contents)


def test_a_chain_grows_as_if_it_were_made_at_once() -> None:
    pool = pool_of(1)
    tokens = tuple(range(12))
    chain: list[bytes] = []
    for end in (1, 1, 4, 6):
        pool.extend_chain(chain, tokens, end)
        assert chain == chain_of(pool, tokens)[:end]


@pytest.mark.parametrize("harm", ["lost", "twice free", "free and used", "miscounted", "forgotten"])
def test_check_sees_each_kind_of_damage(harm: str) -> None:
    pool = pool_of(4)
    table = hold(pool, (1, 2, 3))
    pool.release(hold(pool, (7, 7)))
    pool.check([table])
    if harm == "lost":
        pool._free.pop()
    elif harm == "twice free":
        pool._free.append(pool._free[-1])
    elif harm == "free and used":
        pool._free.append(table[0])
    elif harm == "miscounted":
        pool._owners[table[0]] += 1
    else:
        pool._block_of.popitem()
    with pytest.raises(AssertionError):
        pool.check([table])
