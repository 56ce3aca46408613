import inspect

import pytest
import torch

from roofline.ops import FloatWeight, Int8Weight, Ops
from roofline.ops.reference import ReferenceOps

CONTRACT = sorted(Ops.__abstractmethods__)
IN_PLACE = {"truncate"}  # logits as large as the vocabulary, of which it leaves a few


@pytest.mark.parametrize("backend", [ReferenceOps])
@pytest.mark.parametrize("op", CONTRACT)
def test_a_backend_takes_what_the_contract_says(op: str, backend: type[Ops]) -> None:
    assert inspect.signature(getattr(backend, op)) == inspect.signature(getattr(Ops, op))


@pytest.mark.parametrize("op", sorted(set(CONTRACT) - IN_PLACE))
def test_every_op_writes_to_an_out_it_is_given_last(op: str) -> None:
    *_, last = inspect.signature(getattr(Ops, op)).parameters.values()
    assert last.name == "out" and last.default is inspect.Parameter.empty


def test_rows_of_a_weight_are_its_output_channels() -> None:
    values = torch.zeros(3, 5)
    assert FloatWeight(values).rows == 3
    assert Int8Weight(values.to(torch.int8), torch.ones(3, 1), 32, 0).rows == 3
