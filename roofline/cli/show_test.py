import json
from pathlib import Path

import pytest

from roofline.cli.show import show
from roofline.errors import DownloadError
from roofline.models import hub
from tests.hub_server import Hub
from tests.tiny_model import write_tiny_model


def test_show_says_what_a_fetched_model_is(
    hub_server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = hub_server.add_folder("org/model", write_tiny_model(tmp_path))
    with pytest.raises(DownloadError, match="`roofline pull org/model` fetches it"):
        show("org/model")
    assert hub_server.requests == []
    folder = hub.resolve("org/model")
    capsys.readouterr()
    show("org/model")
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["model"] == "org/model"
    assert shown["parameters"] == "90,560"
    assert shown["tokenizer"] == "byte-level BPE"
    assert shown["license"] == "-"
    show("org/model", revision="main", json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["revision"], facts["path"]) == (repository.commit, str(folder))
    assert (facts["chat_template"], facts["sliding_window"]) == (True, None)


def test_show_takes_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(str(write_tiny_model(tmp_path)), json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["revision"]) == ("llama", None)
