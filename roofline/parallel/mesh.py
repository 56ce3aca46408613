"""A rank's place among the others, and the calls that reach them."""

from dataclasses import dataclass

from roofline.budget import Rank
from roofline.parallel.collectives import Collectives, NoCollectives


@dataclass(frozen=True)
class Mesh:
    """Who I am and how I speak; passed to every layer, fetched by none."""

    rank: Rank
    collectives: Collectives

    @classmethod
    def single(cls) -> "Mesh":
        """The mesh of one rank."""
        return cls(Rank(), NoCollectives())
