from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from roofline.errors import RooflineError
from roofline.parallel.collectives import Collectives, NoCollectives, ThreadGroup

Answer = TypeVar("Answer")


def on_every_rank(
    tensor_ranks: int, stages: int, work: Callable[[Collectives, int, int], Answer]
) -> list[Answer]:
    """What each rank's thread returned, stage by stage; the first failure is raised."""
    group = ThreadGroup(tensor_ranks, stages, timeout_s=20)
    places = [(rank, stage) for stage in range(stages) for rank in range(tensor_ranks)]
    with ThreadPoolExecutor(len(places)) as pool:
        started = [pool.submit(work, group.rank(*place), *place) for place in places]
        return [future.result() for future in started]


def test_one_rank_is_the_identity() -> None:
    alone, x, out = NoCollectives(), torch.tensor([1.0, 2.0]), torch.zeros(2)
    alone.all_reduce(x)
    alone.all_gather(x, [out])
    assert x.tolist() == out.tolist() == [1.0, 2.0]
    for call in (alone.send, alone.recv):
        with pytest.raises(AssertionError):
            call(x)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_all_reduce_adds_in_rank_order_and_gives_every_rank_the_same_bits(ranks: int) -> None:
    torch.manual_seed(0)
    shards = torch.randn(50, ranks, 7) * torch.logspace(-3, 3, ranks)[:, None]

    def work(collectives: Collectives, rank: int, stage: int) -> list[Tensor]:
        sums = []
        for step in shards:
            x = step[rank].clone()
            collectives.all_reduce(x)
            sums.append(x.clone())
            x.fill_(torch.nan)  # what a rank does next must not reach the others
        return sums

    expected = []
    for step in shards:
        total = step[0].clone()
        for shard in step[1:]:
            total += shard
        expected.append(total)
    for sums in on_every_rank(ranks, 1, work):
        assert all(map(torch.equal, sums, expected))


def test_all_gather_fills_places_of_different_widths() -> None:
    widths = [4, 1, 3]

    def work(collectives: Collectives, rank: int, stage: int) -> Tensor:
        whole = torch.full((2, sum(widths)), torch.nan)
        for step in range(30):
            shard = torch.full((2, widths[rank]), float(100 * step + rank))
            collectives.all_gather(shard, whole.split(widths, dim=1))
            shard.fill_(torch.nan)
            assert whole[0].tolist() == [
                100 * step + r for r, w in enumerate(widths) for _ in range(w)
            ]
        return whole

    results = on_every_rank(3, 1, work)
    assert all(torch.equal(result, results[0]) for result in results)


def test_stages_pass_tensors_on_in_order_and_ranks_do_not_mix() -> None:
    def work(collectives: Collectives, rank: int, stage: int) -> list[float]:
        seen: list[float] = []
        x = torch.zeros(3)
        for step in range(40):
            if stage == 0:
                x.fill_(step * 10 + rank)
            else:
                collectives.recv(x)
            collectives.all_reduce(x)
            seen.append(float(x[0]))
            if stage < 2:
                collectives.send(x)
                x.fill_(torch.nan)
        return seen

    results = on_every_rank(2, 3, work)
    for stage in range(3):
        expected = [(20 * step + 1) * 2.0**stage for step in range(40)]
        assert results[2 * stage] == results[2 * stage + 1] == expected


def test_a_rank_that_does_not_come_is_not_waited_for_forever() -> None:
    group = ThreadGroup(2, 1, timeout_s=0.05)
    with pytest.raises(
        RooflineError, match="tensor rank 0 of stage 0 waited in vain for its tensor"
    ):
        group.rank(0, 0).all_reduce(torch.zeros(1))
    with pytest.raises(
        RooflineError, match="tensor rank 1 of stage 0 waited in vain for the stage"
    ):
        group.rank(1, 0).recv(torch.zeros(1))
