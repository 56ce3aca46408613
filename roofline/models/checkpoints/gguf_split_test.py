"""Split files as gguf's own writer makes them, against the unsplit file; and parts that lie."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from roofline.errors import CheckpointError, RooflineError
from roofline.models.checkpoints.gguf import GGUFFile
from roofline.models.checkpoints.gguf_split import SplitGGUF, open_gguf

KEYS = {"llama.block_count": 3, "tokenizer.ggml.tokens": ["a", "b"], "general.name": "tiny"}
TYPES = ("F32", "F16", "Q8_0", "Q4_0")
COUNT = 7  # tensors


def save(folder: Path, *, seed: int = 0, keys: dict[str, Any] = KEYS, **split: Any) -> list[Path]:
    """The same tensors in as many files as `split` asks for, in the order of the parts."""
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", **split)
    for key, value in keys.items():
        match value:
            case int():
                writer.add_uint32(key, value)
            case list():
                writer.add_array(key, value)
            case _:
                writer.add_string(key, value)
    rng = np.random.default_rng(seed)
    for index in range(COUNT):
        kind = gguf.GGMLQuantizationType[TYPES[index % len(TYPES)]]
        values = rng.standard_normal((index + 1, 32)).astype(np.float32)
        writer.add_tensor(f"t{index}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m*.gguf"))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts, of 3, 3 and 1 tensors."""
    found = save(tmp_path / "split", split_max_tensors=3)
    assert [path.name for path in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def refusal(path: Path) -> str:
    with pytest.raises(RooflineError) as caught:
        open_gguf(path)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < len(str(path)) + 300
    return caught.value.message


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Replace what stands in a file once by as many bytes."""
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    "split",
    [
        {"split_max_tensors": 3},
        {"split_max_tensors": 1},
        {"split_max_size": 500},
        {"split_max_tensors": 4, "small_first_shard": True},
    ],
    ids=str,
)
def test_parts_hold_what_the_unsplit_file_holds_whichever_is_named(
    tmp_path: Path, split: dict[str, Any]
) -> None:
    whole = GGUFFile(save(tmp_path / "whole")[0])
    paths = save(tmp_path / "split", **split)
    assert len(paths) > 1
    for path in paths:
        with open_gguf(path) as file:
            assert isinstance(file, SplitGGUF)
            assert file.path == paths[0]
            own = {key: v for key, v in file.metadata.items() if not key.startswith("split.")}
            assert own == whole.metadata
            assert file.tensors.keys() == whole.tensors.keys()
            for name, info in whole.tensors.items():
                found = file.tensors[name]
                assert (found.type, found.shape) == (info.type, info.shape)
                assert file.raw(name).tobytes() == whole.raw(name).tobytes()


def test_an_unsplit_file_is_itself_whatever_its_name(tmp_path: Path) -> None:
    (path,) = save(tmp_path)
    for name in ("m.gguf", "m-00001-of-00001.gguf", "part.GGUF"):
        path = path.rename(tmp_path / name)
        assert len(open_gguf(path).tensors) == COUNT


def test_closing_unmaps_all_parts(parts: list[Path]) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    file = open_gguf(parts[1])
    assert all(str(path) in maps.read_text() for path in parts)
    file.close()
    assert not any(str(path) in maps.read_text() for path in parts)


def no_middle(parts: list[Path]) -> Path:
    parts[1].unlink()
    return parts[2]


def no_first(parts: list[Path]) -> Path:
    parts[0].unlink()
    return parts[2]


def exchanged(parts: list[Path]) -> Path:
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1])
    parts[1].with_name("x").rename(parts[2])
    return parts[0]


def of_a_split_into_four(parts: list[Path]) -> Path:
    other = save(parts[0].parent / "other", split_max_tensors=2)
    assert len(other) == 4
    other[1].replace(parts[1])
    return parts[0]


def of_fewer_tensors(parts: list[Path]) -> Path:
    edit(parts[1], b"split.tensors.count\5\0\0\0\7", b"split.tensors.count\5\0\0\0\6")
    return parts[0]


def counting_more_tensors(parts: list[Path]) -> Path:
    for path in parts:
        edit(path, b"split.tensors.count\5\0\0\0\7", b"split.tensors.count\5\0\0\0\x09")
    return parts[0]


def with_a_tensor_twice(parts: list[Path]) -> Path:
    edit(parts[2], b"t6", b"t1")
    return parts[0]


def with_a_key_of_its_own(parts: list[Path]) -> Path:
    edit(parts[1], b"split.tensors.count", b"llama.block_count\nx")
    return parts[0]


def whole_file_named_as_a_part(parts: list[Path]) -> Path:
    (whole,) = save(parts[0].parent / "whole")
    return whole.replace(parts[0])


def cut_short(parts: list[Path]) -> Path:
    parts[1].write_bytes(parts[1].read_bytes()[:-40])
    return parts[0]


def directory_for_a_part(parts: list[Path]) -> Path:
    parts[1].unlink()
    parts[1].mkdir()
    return parts[0]


LIES: list[tuple[Callable[[list[Path]], Path], int, str]] = [
    (no_middle, 2, "1 of 3 parts are missing: m-00002-of-00003.gguf"),
    (no_first, 2, "1 of 3 parts are missing: m-00001-of-00003.gguf"),
    (exchanged, 1, "split.no is 2 and split.count is 3; its name makes them 1 and 3"),
    (of_a_split_into_four, 1, "split.no is 1 and split.count is 4; its name makes them 1 and 3"),
    (of_fewer_tensors, 1, "'split.tensors.count' is the int 6, but m-00001-of-00003.gguf says the"),
    (counting_more_tensors, 0, "split.tensors.count is 9, but the 3 parts hold 7"),
    (with_a_tensor_twice, 2, "tensor 't1' is in m-00001-of-00003.gguf too"),
    (
        with_a_key_of_its_own,
        1,
        r"'llama.block_count\nx' is the int 7, but m-00001-of-00003.gguf lac",
    ),
    (whole_file_named_as_a_part, 0, "metadata key split.no is missing"),
    (cut_short, 1, "but the file ends at"),
    (directory_for_a_part, 1, "is a directory; a GGUF file is needed"),
]


@pytest.mark.parametrize(("lie", "at", "problem"), LIES, ids=lambda v: getattr(v, "__name__", ""))
def test_parts_that_do_not_make_one_model_are_refused_by_name(
    parts: list[Path], lie: Callable[[list[Path]], Path], at: int, problem: str
) -> None:
    message = refusal(lie(parts))
    assert message.startswith(f"{parts[at]}: ")
    assert problem in message


def test_a_part_under_another_name_is_told_how_parts_are_named(parts: list[Path]) -> None:
    path = parts[1].rename(parts[1].with_name("part2.gguf"))
    assert refusal(path) == (
        f"{path}: is one of 3 parts (split.count), but is not named like one; "
        "name them NAME-00001-of-00003.gguf and so on"
    )
    path = parts[0].rename(parts[0].with_name("m-00004-of-00003.gguf"))
    assert refusal(path) == f"{path}: there is no part 4 of 3"


def test_a_name_of_99999_parts_is_refused_at_once(parts: list[Path]) -> None:
    path = parts[0].rename(parts[0].with_name("m-00001-of-99999.gguf"))
    started = time.thread_time()
    message = refusal(path)
    assert time.thread_time() - started < 5
    assert "99998 of 99999 parts are missing: m-00002-of-99999.gguf, " in message


def test_random_damage_of_any_part_is_refused_or_harmless(parts: list[Path]) -> None:
    valid = [path.read_bytes() for path in parts]
    rng = np.random.default_rng(21)
    deadline, refused = time.monotonic() + 10, 0
    for _ in range(600):
        index = int(rng.integers(0, len(parts)))
        damaged = np.frombuffer(valid[index], np.uint8).copy()
        places = rng.integers(0, min(400, damaged.size), rng.integers(1, 4))
        damaged[places] = rng.choice(np.array([0, 1, 2, 3, 0x7F, 0x80, 0xFF], np.uint8))
        parts[index].write_bytes(damaged[: rng.integers(1, 9 * damaged.size)].tobytes())
        try:
            with open_gguf(parts[int(rng.integers(0, len(parts)))]) as file:
                for name in file.tensors:
                    assert file.raw(name).nbytes == file.tensors[name].nbytes
        except RooflineError as error:
            refused += 1
            assert error.message.startswith(str(parts[0].parent))
            assert error.message.isprintable()
        parts[index].write_bytes(valid[index])
        if time.monotonic() > deadline:
            break
    assert refused > 50


def test_a_folder_where_the_only_part_is_a_dangling_link_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="2 of 2 parts are missing"):
        open_gguf(path)
