import datetime
import json
from pathlib import Path

import pytest

from roofline.cli.ls import ls
from roofline.models import hub
from roofline.models.huggingface_test import QUANTS
from tests.hub_server import Hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOFLINE_CACHE", str(tmp_path))


def test_ls_names_each_model_its_size_and_its_day(
    hub_server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_server.add("org/quants", QUANTS)
    path = hub.resolve("org/quants:Q4_K_M")
    capsys.readouterr()
    ls()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "org/" in line]
    day = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d")
    words = row.split()
    assert words == ["org/quants:Q4_K_M", "gguf", "Q4_K_M", "0.0", "MB", day, words[6], "main"]
    ls(json=True)
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model == {
        "reference": "org/quants:Q4_K_M",
        "revision": "main",
        "format": "gguf Q4_K_M",
        "bytes": len(QUANTS["m-Q4_K_M.gguf"]),
        "modified": pytest.approx(path.stat().st_mtime),
        "path": str(path),
    }


def test_ls_of_nothing_says_so(hub_server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    ls()
    assert "nothing has been fetched; `roofline pull MODEL` does" in capsys.readouterr().out
    ls(json=True)
    assert json.loads(capsys.readouterr().out) == {"models": []}
