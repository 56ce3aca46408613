import errno
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from roofline.errors import CapacityError, DownloadError, RooflineError, UnsupportedError
from roofline.models import huggingface
from roofline.models.repository import Fetch, RepoReference
from tests.hub_server import Hub

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 260,
}
FOLDER = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b"{}",
    "tokenizer.json": b"{'tokens'}",
    "tokenizer_config.json": b"{} ",
    "model.safetensors": os.urandom(300_000),
}
NOT_READ = {
    "README.md": b"# Model",
    ".gitattributes": b"",
    "pytorch_model.bin": b"\x80pickle",
    "modeling_llama.py": b"raise SystemExit",
    "original/consolidated.00.pth": b"PK",
    "onnx/model.onnx": b"onnx",
}
QUANTS = {f"m-{quant}.gguf": quant.encode() * 1000 for quant in ("Q4_K_M", "Q8_0", "F16")}
ORG = RepoReference("org/model")


def locate(repo: str = "org/model", revision: str | None = None, fetch: Fetch = "model") -> Path:
    reference = RepoReference.parse(repo)
    assert reference is not None
    return huggingface.locate(reference, revision, fetch)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refusal(repo: str = "org/model", **how: Any) -> RooflineError:
    with pytest.raises(RooflineError) as caught:
        locate(repo, **how)
    assert "\n" not in caught.value.message and len(caught.value.message) < 500
    return caught.value


def test_a_folder_is_fetched_once_with_only_what_is_read(hub_server: Hub) -> None:
    repository = hub_server.add("org/model", FOLDER | NOT_READ)
    folder = locate()
    assert contents(folder) == FOLDER
    assert folder.name == repository.commit
    assert sorted(hub_server.fetched()) == sorted(FOLDER)
    assert locate() == folder
    assert hub_server.requests == []


def test_the_config_alone_serves_to_describe(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER | NOT_READ)
    folder = locate(fetch="config")
    assert "model.safetensors" not in contents(folder)
    hub_server.fetched()
    assert locate(fetch="config") == locate(fetch="nothing") == folder
    assert hub_server.requests == []
    assert locate() == folder
    assert hub_server.fetched() == ["model.safetensors"]


def test_what_would_not_run_is_refused_before_its_weights_are_fetched(hub_server: Hub) -> None:
    config = json.dumps({"model_type": "mixtral"}).encode()
    hub_server.add("org/model", FOLDER | {"config.json": config})
    error = refusal()
    assert isinstance(error, UnsupportedError) and "mixtral" in error.message
    assert "model.safetensors" not in hub_server.fetched()


def test_shards_are_fetched_with_their_index(hub_server: Hub) -> None:
    files = {name: data for name, data in FOLDER.items() if name != "model.safetensors"}
    shards = {f"model-0000{part}-of-00002.safetensors": os.urandom(1000) for part in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    hub_server.add("org/model", files | shards | index | {"consolidated.safetensors": b"twice"})
    assert contents(locate()) == files | shards | index


def test_gguf_is_the_file_asked_for_or_said_in_one_line(
    hub_server: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub_server.add("org/model", QUANTS | NOT_READ | {"config.json": b"{}"})
    file = locate("org/model:q4_k_m")
    assert file.name == "m-Q4_K_M.gguf"
    assert contents(file.parent) == {file.name: QUANTS[file.name]}
    capfd.readouterr()
    assert huggingface.download(ORG).name == "m-Q8_0.gguf"
    line = "org/model: takes m-Q8_0.gguf; also here: F16, Q4_K_M\n"
    assert capfd.readouterr().err.startswith(line)
    hub_server.fetched()
    assert locate("org/model:F16").name == "m-F16.gguf"
    assert hub_server.fetched() == ["m-F16.gguf"]
    assert "it has: F16, Q4_K_M, Q8_0" in refusal("org/model:Q5_0").message


def test_all_parts_of_a_split_gguf_are_fetched_and_the_first_returned(hub_server: Hub) -> None:
    parts = {f"Q8_0/m-Q8_0-0000{part}-of-00003.gguf": os.urandom(100) for part in (1, 2, 3)}
    hub_server.add("org/model", parts | QUANTS)
    file = locate("org/model:m-Q8_0-00001")
    assert file.name == "m-Q8_0-00001-of-00003.gguf"
    assert contents(file.parents[1]) == parts
    hub_server.fetched()
    file.with_name("m-Q8_0-00003-of-00003.gguf").unlink()
    assert locate("org/model:m-Q8_0-00001") == file
    assert hub_server.fetched() == []  # its bytes were in the cache still
    assert contents(file.parents[1]) == parts


def test_a_connection_that_breaks_is_resumed_where_it_broke(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub_server.add("org/model", FOLDER, cut_at={"model.safetensors": 100_000})
    assert contents(locate()) == FOLDER
    ranges = [
        asked for _, path, asked in hub_server.requests if asked and "model.safetensors" in path
    ]
    assert ranges == ["bytes=100000-"]


def test_a_fetch_that_fails_leaves_whole_files_and_the_next_brings_the_rest(
    hub_server: Hub,
) -> None:
    repository = hub_server.add("org/model", FOLDER, failing={"model.safetensors"})
    assert "answered 500; try again later" in refusal().message
    kept = contents(huggingface.cache_folder())
    assert not [name for name in kept if "incomplete" in name]
    assert not [name for name in kept if name.endswith("refs/main")]
    assert "holds no whole copy" in refusal(fetch="nothing").message
    repository.failing.clear()
    hub_server.fetched()
    assert contents(locate()) == FOLDER
    assert hub_server.fetched() == ["model.safetensors"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER, refs={"main", "v1.0", "refs/pr/1"})
    folder = locate(revision="v1.0")
    assert locate(revision=folder.name) == locate(revision="refs/pr/1") == folder
    hub_server.requests.clear()
    assert locate(revision="v1.0") == locate(revision="refs/pr/1") == folder
    assert hub_server.requests == []
    assert refusal(revision="v2").message.startswith("org/model has no revision 'v2' on http://")


def test_a_branch_that_moved_is_seen_when_asked_for(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER)
    old = locate()
    weights = os.urandom(1000)
    hub_server.add("org/model", FOLDER | {"model.safetensors": weights})
    hub_server.fetched()
    assert locate() == old
    new = huggingface.refresh(ORG)
    assert hub_server.fetched() == ["model.safetensors"]
    assert contents(new) == FOLDER | {"model.safetensors": weights}
    assert locate() == new != old
    assert locate(revision=old.name) == old


@pytest.fixture(params=["offline", "unplugged"])
def cut_off(
    request: pytest.FixtureRequest, hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A model in the cache, and no hub any more; the reason that is given."""
    hub_server.add("org/model", FOLDER)
    locate()
    if request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return f"{hub_server.endpoint} cannot be asked: HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return "http://127.0.0.1:9 cannot be asked: [Errno 111] Connection refused"


def test_without_network_the_cache_serves(cut_off: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = locate()
    assert contents(folder) == FOLDER
    assert huggingface.refresh(ORG) == folder
    assert capfd.readouterr().err.endswith(f"org/model is as it was: {cut_off}\n")


def test_without_network_every_place_tried_is_named(cut_off: str) -> None:
    places = f"is no path here, no built-in model, and {huggingface.cache_folder()} holds no whole"
    for repo, revision in (("org/other", "main"), ("org/model:Q8_0", "main"), ("org/model", "v1")):
        message = refusal(repo, revision=revision).message
        assert message.startswith(f"{repo} {places} copy of its revision '{revision}'; ")
        assert message.endswith(cut_off)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (
            {"gated": True},
            r"org/model is gated: ask for access at http.*/org/model, then set HF_TO",
        ),
        ({"token": "secret"}, "answered 401; check HF_TOKEN"),
        ({"status": 403}, "answered 403; check HF_TOKEN"),
        ({"status": 503}, "answered 503; try again later"),
        ({"status": 201}, "does not answer as a Hugging Face hub does; is HF_ENDPOINT right"),
    ],
    ids=["gated", "private", "forbidden", "busy", "login"],
)
def test_what_the_hub_refuses_is_one_line(
    hub_server: Hub, faults: dict[str, Any], message: str
) -> None:
    hub_server.add("org/model", FOLDER, **faults)
    error = refusal()
    assert isinstance(error, DownloadError)
    assert re.search(message, error.message)


def test_a_repository_that_is_not_there_is_one_line(hub_server: Hub) -> None:
    message = refusal("org/none").message
    assert "org/none is no path here, and http" in message
    assert "no such repository, or hides it: check the name, or set HF_TOKEN" in message


def test_a_token_opens_what_is_private(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_server.add("org/model", FOLDER, token="secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert contents(locate()) == FOLDER


def test_a_repository_that_names_files_outside_of_it_gets_nothing_written(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER | {"../../../../escaped.gguf": b"GGUF"})
    assert "refused: it lists a file named '../../../../escaped.gguf'" in refusal().message
    assert hub_server.fetched() == []
    assert not huggingface.cache_folder().exists()


def test_too_little_disk_is_said_before_anything_is_fetched(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub_server.add("org/model", FOLDER)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    error = refusal()
    assert isinstance(error, CapacityError)
    assert re.search(r"needs 0\.3 MB of disk in .*, but 0\.1 MB are free", error.message)
    assert hub_server.fetched() == []


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOSPC, CapacityError, "the disk of .* is full"),
        (errno.EACCES, DownloadError, "cannot fetch org/model into .*Permission denied"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line(
    hub_server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[RooflineError],
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    hub_server.add("org/model", FOLDER)
    monkeypatch.setattr(huggingface, "hf_hub_download", fail)
    error = refusal()
    assert type(error) is kind
    assert re.search(message, error.message)


def test_fetching_at_once_gives_everyone_the_whole_model(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER)
    found: list[dict[str, bytes]] = []
    threads = [threading.Thread(target=lambda: found.append(contents(locate()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [FOLDER] * 4
    assert not [name for name in contents(huggingface.cache_folder()) if "incomplete" in name]


def test_off_a_terminal_a_fetch_is_one_line_and_its_second_time_none(
    hub_server: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub_server.add("org/model", FOLDER)
    locate()
    assert capfd.readouterr() == ("", f"Fetching org/model (0.3 MB) from {hub_server.endpoint}\n")
    huggingface.refresh(ORG)
    locate()
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_one_bar_counts_every_byte(
    hub_server: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    hub_server.add("org/model", FOLDER)
    locate()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capfd.readouterr().err)
    assert set(re.findall(r"Downloading \S+", text)) == {"Downloading org/model"}
    assert "300.2/300.2 kB" in text and "%" not in text
