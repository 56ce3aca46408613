"""What min_p, top_k and top_p leave of a row of logits. The definition; kernels follow it.

Probabilities are compared as logarithms and summed as integers: both are the same in whatever
order a kernel comes to them.
"""

import math

import torch
from torch import Tensor

UNITS = 2.0**43  # of probability, of the likeliest token: a vocabulary of 2**19 sums up in 63 bits


def truncate(logits: Tensor, min_p: float, top_k: int, top_p: float) -> None:
    """Set to -inf what is left out of logits [V] float32, changed in place; 0, 0 and 1 are off.

    In this order: less likely than min_p times the likeliest; smaller than the top_k-th; and
    what lies below a mass of top_p of the rest. Ties at the border of top_k stay in; at that of
    top_p the lower id goes first. Without a finite maximum min_p and top_p leave out nothing.
    """
    top = logits.max().double()
    if min_p > 0 and top.isfinite():
        logits[logits.double() - top < math.log(min_p)] = -torch.inf
    if 0 < top_k < len(logits):
        logits[logits < torch.topk(logits, top_k).values[-1]] = -torch.inf
    if top_p < 1 and top.isfinite():
        ids = torch.sort(logits, descending=True, stable=True).indices
        mass = (torch.exp(logits.double() - top) * UNITS).round().long()[ids]
        before = mass.cumsum(dim=0) - mass
        logits[ids[before.double() >= top_p * mass.sum().double()]] = -torch.inf
