import torch

from roofline.execution.arena import allocate, storage_bytes


def test_buffers_have_their_planned_shapes_and_are_zero() -> None:
    arena = allocate({"a": ((2, 3), "bfloat16"), "b": ((4,), "int64"), "none": ((0, 5), "float32")})
    assert {name: (tuple(t.shape), t.dtype) for name, t in arena.items()} == {
        "a": ((2, 3), torch.bfloat16),
        "b": ((4,), torch.int64),
        "none": ((0, 5), torch.float32),
    }
    assert not any(t.any() for t in arena.values())


def test_storage_is_counted_once_whatever_views_there_are_of_it() -> None:
    whole, other = torch.zeros(10, dtype=torch.int32), torch.zeros(3, dtype=torch.int8)
    assert storage_bytes([whole, whole[2:4], whole.view(2, 5), other]) == 43
    assert storage_bytes([]) == 0
