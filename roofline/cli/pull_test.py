import json

import pytest

from roofline.cli.pull import pull
from roofline.errors import UsageError
from roofline.models.huggingface_test import FOLDER, contents, locate
from tests.hub_server import Hub


def test_pull_prints_the_path_of_what_it_fetched(
    hub_server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_server.add("org/model", FOLDER, refs={"main", "v1"})
    pull("org/model", revision="v1")
    out, err = capsys.readouterr()
    folder = locate(revision="v1")
    assert (out, err.count("\n")) == (f"{folder}\n", 1)
    assert contents(folder) == FOLDER
    pull("org/model", json=True)
    assert json.loads(capsys.readouterr().out) == {"model": "org/model", "path": str(folder)}


def test_a_path_has_nothing_to_pull() -> None:
    with pytest.raises(UsageError, match=r"README\.md is a path: there is nothing to fetch"):
        pull("README.md")
