import os
import struct
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest

from roofline.errors import CheckpointError, RooflineError, UnsupportedError
from roofline.models.checkpoints.gguf import GGUFFile, TensorInfo

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FLOAT32, Q4_0 = 0, 2  # tensor types
HUGE = 1 << 63


class Tensor(NamedTuple):
    """A tensor as a file describes it, true or not; sizes in the file's order."""

    name: bytes = b"t"
    sizes: Sequence[int] = (8,)
    type: int = FLOAT32
    offset: int = 0
    n_dims: int | None = None


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def key(name: bytes, value_type: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + value


def array(item_type: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", item_type, count) + items


def alignment(value: int) -> bytes:
    return key(b"general.alignment", U32, struct.pack("<I", value))


def image(
    keys: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    data: bytes = b"",
) -> bytes:
    """The bytes of a GGUF file whose counts may lie; data starts at a multiple of 32."""
    n_keys = len(keys) if n_keys is None else n_keys
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    out = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys)
    for t in tensors:
        n_dims = len(t.sizes) if t.n_dims is None else t.n_dims
        out += text(t.name) + struct.pack("<I", n_dims)
        out += struct.pack(f"<{len(t.sizes)}Q", *t.sizes) + struct.pack("<IQ", t.type, t.offset)
    return out + b"\0" * (-len(out) % 32) + data


def write(directory: Path, content: bytes) -> Path:
    path = directory / "model.gguf"
    path.write_bytes(content)
    return path


FLOATS = bytes(np.arange(8, dtype="<f4"))  # 32 bytes
STRINGS = key(b"s", ARRAY, array(STRING, 2, text(b"long enough" * 9) + text(b"")))
VALID = image(
    [STRINGS, alignment(32)], [Tensor(b"a"), Tensor(b"b", (4, 2), offset=32)], data=FLOATS * 2
)

HOSTILE = {
    "seven bytes": (b"GGUF\3\0\0", "no room for the version before the end of the file, 7 bytes"),
    "only a magic": (b"GGUF", "no room for the version"),
    "version 0": (image(version=0), "version 0 is not supported; supported: 2, 3"),
    "version 1": (image(version=1), "version 1 is not supported; supported: 2, 3"),
    "version 4": (image(version=4), "version 4 is not supported"),
    "version 99": (image(version=99), "version 99 is not supported"),
    "big-endian": (image(version=3 << 24), "big-endian GGUF is not supported"),
    "2^63 keys": (image(n_keys=HUGE), f"no room for {HUGE} metadata keys before"),
    "2^64 - 1 tensors": (
        image(n_tensors=(1 << 64) - 1),
        f"no room for {(1 << 64) - 1} tensors before",
    ),
    "one key too few": (image(n_keys=1), "metadata key"),
    "key of 2^63 bytes": (image([struct.pack("<Q", HUGE) + b"k" * 40]), "name of metadata key 0"),
    "string of 2^63 bytes": (
        image([key(b"k", STRING, struct.pack("<Q", HUGE))]),
        "no room for a string of metadata key 'k' before the end of the file",
    ),
    "string of 2^64 - 1 bytes": (
        image([key(b"k", STRING, struct.pack("<Q", (1 << 64) - 1))]),
        "no room for a string of metadata key 'k' before",
    ),
    "invalid UTF-8 in a value": (image([key(b"k", STRING, text(b"\xff\xfe"))]), "not valid UTF-8"),
    "invalid UTF-8 in a key": (image([key(b"\xc3", U8, b"\0")]), "metadata key 0 is not valid"),
    "invalid UTF-8 in a token": (
        image([key(b"k", ARRAY, array(STRING, 2, text(b"fine") + text(b"\x80")))]),
        "'k' is not valid UTF-8, in its string 1",
    ),
    "array of 2^63 bytes": (
        image([key(b"k", ARRAY, array(U8, HUGE, b""))]),
        "no room for metadata key 'k'",
    ),
    "array of 2^61 u64": (
        image([key(b"k", ARRAY, array(U64, 1 << 61, b""))]),
        "no room for metadata key 'k'",
    ),
    "array of 2^63 strings": (
        image([key(b"k", ARRAY, array(STRING, HUGE, b""))]),
        "no room for metadata key 'k'",
    ),
    "array of strings cut short": (
        image([key(b"k", ARRAY, array(STRING, 2, text(b"a") + struct.pack("<Q", 99)))]),
        "no room for a string of metadata key 'k' before",
    ),
    "array of arrays": (
        image([key(b"k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))]),
        "'k' is an array of arrays",
    ),
    "array of unknown items": (image([key(b"k", ARRAY, array(13, 1, b"\0"))]), "value type 13"),
    "unknown value type": (image([key(b"k", 77, b"\0")]), "'k' has value type 77"),
    "boolean of 2": (image([key(b"k", BOOL, b"\2")]), "'k' holds a boolean"),
    "duplicate key": (image([key(b"k", U8, b"\0")] * 2), "key 'k' appears twice"),
    "key that would break the line": (
        image([key(b"a\n\x1b[2J" + b"b" * 999, BOOL, b"\2")]),
        r"metadata key 'a\n\x1b[2Jb",
    ),
    "alignment 0": (image([alignment(0)]), "general.alignment is 0; it must be a power of two"),
    "alignment 3": (image([alignment(3)]), "general.alignment is 3"),
    "alignment 4": (image([alignment(4)]), "general.alignment is 4"),
    "alignment 2^31": (image([alignment(1 << 31)]), f"general.alignment is {1 << 31}"),
    "alignment as text": (
        image([key(b"general.alignment", STRING, text(b"32"))]),
        "general.alignment is the string '32'; it must be an integer",
    ),
    "no dimensions": (image([], [Tensor(sizes=())]), "'t' has 0 dimensions; it must have 1 to 4"),
    "five dimensions": (image([], [Tensor(sizes=(1,) * 5)]), "'t' has 5 dimensions"),
    "2^32 - 1 dimensions": (image([], [Tensor(n_dims=(1 << 32) - 1)]), "dimensions"),
    "dimension of 0": (
        image([], [Tensor(sizes=(8, 0))]),
        "dimension of size 0 in its shape [0, 8]",
    ),
    "dimension of 2^63": (image([], [Tensor(sizes=(HUGE,))], data=FLOATS), "the file ends at"),
    "shape whose product wraps to 0": (
        image([], [Tensor(sizes=(1 << 32, 1 << 32))], data=FLOATS),
        "the file ends at",
    ),
    "rows not in whole blocks": (
        image([], [Tensor(sizes=(33, 32), type=Q4_0)], data=FLOATS * 99),
        "'t' has rows of 33 weights; Q4_0 needs a multiple of 32",
    ),
    "offset not aligned": (image([], [Tensor(offset=8)], data=FLOATS * 2), "'t' has offset 8"),
    "offset beyond the end": (image([], [Tensor(offset=64)], data=FLOATS), "'t' lies at bytes"),
    "offset of 2^63": (image([], [Tensor(offset=HUGE)], data=FLOATS), "'t' lies at bytes"),
    "data cut short": (image([], [Tensor()], data=FLOATS[:-1]), "'t' lies at bytes 64 to 96"),
    "tensors in one place": (image([], [Tensor(b"a"), Tensor(b"b")], data=FLOATS), "overlap"),
    "tensors that overlap": (
        image([], [Tensor(b"b", offset=32), Tensor(b"a", (9,))], data=FLOATS * 2),
        "tensors 'a' and 'b' overlap",
    ),
    "duplicate tensor": (
        image([], [Tensor(), Tensor(offset=32)], data=FLOATS * 2),
        "tensor 't' appears twice",
    ),
    "unsupported tensor type": (image([], [Tensor(type=23)], data=FLOATS), "type IQ4_XS, which"),
    "unknown tensor type": (image([], [Tensor(type=999)], data=FLOATS), "type number 999, which"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "zip": (b"PK\x03\x04" + bytes(60), "torch.save"),
    "pickle": (b"\x80\x02}q\x00.", "is a pickle, as torch.save writes them, not a GGUF file"),
    "web page": (b"<!DOCTYPE html>", "is a web page, not a GGUF file"),
    "other bytes": (b"safetensors", "starts with the bytes 73 61 66 65, not a GGUF file"),
    "empty": (b"", "is empty; a GGUF file is needed"),
}


@pytest.mark.parametrize(("content", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_a_lying_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = write(tmp_path, content)
    tracemalloc.start()
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        GGUFFile(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300
    assert peak_bytes < 16 << 20


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    for size in range(len(VALID)):
        with pytest.raises(CheckpointError):
            GGUFFile(write(tmp_path, VALID[:size]))


def test_a_vast_sparse_file_cannot_make_a_vast_list(tmp_path: Path) -> None:
    path = write(tmp_path, image([key(b"k", ARRAY, array(STRING, 1 << 26, b""))]))
    os.truncate(path, 1 << 30)
    with pytest.raises(
        CheckpointError, match="no room for metadata key 'k' before the most a header may take"
    ):
        GGUFFile(path)


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    keys = [key(b"s", STRING, text(b"abc")), key(b"a", ARRAY, array(F32, 2, bytes(8)))]
    keys += [key(b"t", ARRAY, array(STRING, 2, text(b"x") + text(b"yz"))), alignment(32)]
    valid = image(keys, [Tensor(b"a"), Tensor(b"b", (32, 2), Q4_0, 32)], data=FLOATS * 3)
    rng = np.random.default_rng(20)
    deadline, refused = time.monotonic() + 10, 0
    for _ in range(1000):
        damaged = np.frombuffer(valid, np.uint8).copy()
        places = rng.integers(0, len(valid), rng.integers(1, 4))
        damaged[places] = rng.choice(np.array([0, 1, 8, 0x7F, 0x80, 0xFF], np.uint8), len(places))
        try:
            with GGUFFile(write(tmp_path, damaged.tobytes())) as file:
                for name in file.tensors:
                    assert file.raw(name).nbytes == file.tensors[name].nbytes
        except RooflineError as error:
            refused += 1
            assert error.message.startswith(str(tmp_path))
        if time.monotonic() > deadline:
            break
    assert refused > 50


@pytest.fixture(params=["missing", "directory", "fifo", "device", "nul", "unreadable"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    path = tmp_path / "model.gguf"
    if request.param == "missing":
        yield path, "no such file"
    elif request.param == "directory":
        path.mkdir()
        yield path, "is a directory"
    elif request.param == "fifo":
        os.mkfifo(path)
        yield path, "is not a regular file"
    elif request.param == "device":
        yield Path("/dev/zero"), "is not a regular file"
    elif request.param == "nul":
        yield tmp_path / "a\0b", "cannot be read"
    else:
        yield write(tmp_path, VALID) / "model.gguf", "cannot be read: Not a directory"


def test_what_is_no_regular_file_is_refused(no_file: tuple[Path, str]) -> None:
    path, problem = no_file
    with pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    assert caught.value.message.startswith(f"{path}: {problem}")


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_are_read_where_they_lie(tmp_path: Path, version: int) -> None:
    tensors = [Tensor(b"second", (4, 2), offset=32), Tensor(b"first")]
    path = write(tmp_path, image([], tensors, version=version, data=FLOATS + FLOATS[::-1]))
    with GGUFFile(path) as file:
        start = path.stat().st_size - 64
        assert file.tensors == {
            "second": TensorInfo("second", "F32", (2, 4), start + 32, 32),
            "first": TensorInfo("first", "F32", (8,), start, 32),
        }
        assert file.raw("first").tobytes() == FLOATS
        assert file.raw("second").tobytes() == FLOATS[::-1]
        assert not file.raw("first").flags.writeable


@pytest.mark.parametrize(("value", "start"), [(8, 152), (16, 160), (64, 192)])
def test_an_own_alignment_moves_the_data(tmp_path: Path, value: int, start: int) -> None:
    content = image([alignment(value)], [Tensor(b"a"), Tensor(b"b" * 30, (1,), offset=64)])
    header = content[:152]
    with GGUFFile(write(tmp_path, header.ljust(start + 68, b"\0"))) as file:
        assert [info.offset for info in file.tensors.values()] == [start, start + 64]


def test_metadata_of_every_type_equals_what_gguf_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -5)
    writer.add_uint32("u32", (1 << 32) - 1)
    writer.add_int32("i32", -(1 << 31))
    writer.add_uint64("u64", (1 << 64) - 1)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", False)
    writer.add_string("string", "naïve 🙂")
    writer.add_array("strings", ["", "a", "ĠĊ", "🙂"])
    writer.add_array("ints", [3, -4])
    writer.add_array("floats", [0.25, -2.0])
    writer.add_array("bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata = dict(GGUFFile(path).metadata)
    arrays = {name: metadata.pop(name) for name in ("ints", "floats", "bools")}
    assert metadata == {
        "general.architecture": "llama",
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -5,
        "u32": (1 << 32) - 1,
        "i32": -(1 << 31),
        "u64": (1 << 64) - 1,
        "i64": -(1 << 63),
        "f32": 0.5,
        "f64": 0.1,
        "bool": False,
        "string": "naïve 🙂",
        "strings": ["", "a", "ĠĊ", "🙂"],
    }
    expected = {"ints": ("int32", [3, -4]), "floats": ("float32", [0.25, -2.0])}
    expected["bools"] = ("bool", [True, False])
    for name, (dtype, values) in expected.items():
        found = arrays[name]
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.tolist()) == (dtype, values)


def test_empty_arrays_are_read(tmp_path: Path) -> None:
    keys = [key(b"s", ARRAY, array(STRING, 0, b"")), key(b"n", ARRAY, array(F64, 0, b""))]
    content = image(keys)
    file = GGUFFile(write(tmp_path, content.rstrip(b"\0").ljust(86, b"\0")))
    assert file.require("s", list) == []
    assert file.require("n", np.ndarray).tolist() == []


def test_typed_access_refuses_another_type_by_name(tmp_path: Path) -> None:
    keys = [
        key(b"int", U32, struct.pack("<I", 7)),
        key(b"bool", BOOL, b"\1"),
        key(b"scores", ARRAY, array(I8, 3, b"\0\0\0")),
        key(b"tokens", ARRAY, array(STRING, 1, text(b"a"))),
    ]
    path = write(tmp_path, image(keys))
    file = GGUFFile(path)
    assert (file.require("int", int), file.get("bool", bool), file.get("no", str)) == (
        7,
        True,
        None,
    )
    refusals = {
        "int is the int 7; it must be a string": lambda: file.get("int", str),
        "int is the int 7; it must be a floating-point number": lambda: file.get("int", float),
        "bool is the bool True; it must be an integer": lambda: file.require("bool", int),
        "scores is an array of 3 int8 numbers; it must be an array of strings": (
            lambda: file.get("scores", list)
        ),
        "tokens is an array of 1 strings; it must be an array of numbers": (
            lambda: file.get("tokens", np.ndarray)
        ),
        "metadata key no is missing": lambda: file.require("no", int),
    }
    for problem, ask in refusals.items():
        with pytest.raises(CheckpointError) as caught:
            ask()
        assert caught.value.message == f"{path}: {problem}"


def test_a_vocabulary_of_150_000_tokens_opens_in_two_seconds(tmp_path: Path) -> None:
    count = 150_000
    tokens = b"".join(text(b"token%d" % i) for i in range(count))
    merges = b"".join(text(b"to ken%d" % i) for i in range(count))
    keys = [
        key(b"tokenizer.ggml.tokens", ARRAY, array(STRING, count, tokens)),
        key(b"tokenizer.ggml.merges", ARRAY, array(STRING, count, merges)),
        key(b"tokenizer.ggml.scores", ARRAY, array(F32, count, bytes(4 * count))),
        key(b"tokenizer.ggml.token_type", ARRAY, array(I32, count, bytes(4 * count))),
    ]
    path = write(tmp_path, image(keys))
    seconds: list[float] = []
    for _ in range(3):
        start = time.thread_time()
        file = GGUFFile(path)
        seconds.append(time.thread_time() - start)
    assert file.require("tokenizer.ggml.tokens", list)[-1] == "token149999"
    assert min(seconds) < 2


def test_closing_unmaps_the_file(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    path = write(tmp_path, VALID)
    file = GGUFFile(path)
    assert str(path) in maps.read_text()
    file.close()
    assert str(path) not in maps.read_text()
