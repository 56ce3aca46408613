from roofline.budget import Rank
from roofline.parallel.collectives import NoCollectives
from roofline.parallel.mesh import Mesh


def test_a_single_rank_is_the_first_and_the_last_stage_and_speaks_to_nobody() -> None:
    mesh = Mesh.single()
    assert mesh.rank == Rank()
    assert mesh.rank.is_first_stage and mesh.rank.is_last_stage
    assert isinstance(mesh.collectives, NoCollectives)
