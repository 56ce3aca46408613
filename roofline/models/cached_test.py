from pathlib import Path

import pytest
from huggingface_hub import constants

from roofline.errors import RooflineError, UsageError
from roofline.models import builtin, cached, hub, huggingface
from roofline.models.huggingface_test import FOLDER, NOT_READ, QUANTS, contents
from tests.hub_server import Hub


@pytest.fixture(autouse=True)
def empty_cache(hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOFLINE_CACHE", str(tmp_path / "own"))


def listed() -> list[tuple[str, str | None, str, int]]:
    models = cached.cached_models()
    return [(model.reference, model.revision, model.format, model.size_bytes) for model in models]


def remove(reference: str, revision: str | None = None) -> int:
    removal = cached.plan_removal(reference, revision)
    removal.execute()
    return removal.size_bytes


def builtin_file() -> Path:
    """A built-in model's file, as large as it must be, of no bytes on the disk."""
    model = builtin.BUILTIN_MODELS["smollm2-135m"]
    path = builtin.builtin_path(model)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(model.size_bytes)
    return path


def test_nothing_fetched_is_nothing_listed() -> None:
    assert listed() == []


def test_everything_that_runs_is_listed_by_the_name_that_runs_it(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER | NOT_READ)
    hub_server.add("org/quants", QUANTS)
    path = builtin_file()
    hub.resolve("org/model")
    for quant in ("Q8_0", "F16"):
        hub.resolve(f"org/quants:{quant}")
    assert listed() == [
        ("org/model", "main", "safetensors", len(FOLDER["model.safetensors"])),
        ("org/quants:F16", "main", "gguf F16", len(QUANTS["m-F16.gguf"])),
        ("org/quants:Q8_0", "main", "gguf Q8_0", len(QUANTS["m-Q8_0.gguf"])),
        ("smollm2-135m", None, "gguf Q4_1", path.stat().st_size),
    ]
    hub_server.requests.clear()
    for model in cached.cached_models():
        assert hub.resolve(model.reference, revision=model.revision) == model.path
    assert hub_server.requests == []


def test_what_would_not_run_is_not_listed(hub_server: Hub) -> None:
    path = builtin_file()
    path.write_bytes(b"half")
    hub_server.add("org/model", FOLDER)
    hub.resolve("org/model", fetch="config")
    hub_server.add("org/other", FOLDER | {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(RooflineError):
        hub.resolve("org/other")
    (Path(constants.HF_HUB_CACHE) / "datasets--org--data").mkdir()
    assert listed() == []


def test_commits_are_listed_by_branch_by_tag_or_by_hash(hub_server: Hub) -> None:
    first = hub_server.add("org/quants", {"m-Q8_0.gguf": b"first"}, refs={"main", "v1"}).commit
    hub.resolve("org/quants")
    second = hub_server.add("org/quants", {"m-Q8_0.gguf": b"second"}, refs={"main", "v2"}).commit
    hub.resolve("org/quants", revision="v2")
    hub.pull("org/quants", revision=second)
    assert [row[1] for row in listed()] == ["main", "v2"]
    hub.pull("org/quants")
    assert sorted(row[1] or "" for row in listed()) == sorted([first, "main"])


def test_a_repository_is_removed_whole(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER)
    hub_server.add("org/quants", QUANTS)
    hub.resolve("org/model")
    hub.resolve("org/quants:F16")
    assert remove("org/model") == sum(map(len, FOLDER.values()))
    assert [row[0] for row in listed()] == ["org/quants:F16"]
    assert not list(huggingface.cache_folder().glob("models--org--model"))
    with pytest.raises(UsageError, match="org/model is not here; `roofline ls` lists what is"):
        remove("org/model")


def test_another_repository_with_the_same_commit_stays(hub_server: Hub) -> None:
    for name in ("org/model", "org/copy"):
        hub_server.add(name, FOLDER)
        hub.resolve(name)
    remove("org/model")
    assert [row[0] for row in listed()] == ["org/copy"]


def test_a_revision_is_removed_without_what_others_share(hub_server: Hub) -> None:
    hub_server.add("org/model", FOLDER)
    old = hub.resolve("org/model")
    changed = {"generation_config.json": b'{"eos_token_id": 2}'}
    hub_server.add("org/model", FOLDER | changed)
    new = hub.pull("org/model")
    assert remove("org/model", old.name) == len(FOLDER["generation_config.json"])
    assert contents(new) == FOLDER | changed
    with pytest.raises(UsageError, match="org/model is not here in revision 'v1'; here: main"):
        remove("org/model", "v1")


def test_one_gguf_model_of_several_is_removed(hub_server: Hub) -> None:
    hub_server.add("org/quants", QUANTS)
    kept, gone = (hub.resolve(f"org/quants:{quant}") for quant in ("F16", "Q8_0"))
    with pytest.raises(UsageError, match="no GGUF file of 'Q4_K_M'; it has: F16, Q8_0"):
        remove("org/quants:Q4_K_M")
    assert remove("org/quants:q8_0") == len(QUANTS["m-Q8_0.gguf"])
    assert not gone.exists()
    assert kept.read_bytes() == QUANTS["m-F16.gguf"]
    remove("org/quants:F16")
    assert not list(huggingface.cache_folder().glob("models--org--quants"))


def test_a_builtin_model_is_removed() -> None:
    path = builtin_file()
    assert remove("smollm2-135m") == builtin.BUILTIN_MODELS["smollm2-135m"].size_bytes
    assert not path.exists()
    with pytest.raises(UsageError, match="smollm2-135m is not here"):
        remove("smollm2-135m")


def test_a_path_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="is a path; `roofline rm` removes only what was fetched"):
        remove(str(path))
    assert path.exists()
