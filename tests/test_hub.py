"""Models of a Hugging Face hub through the doors: processes that know it by their environment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roofline import LLM, SamplingParams
from roofline.models import huggingface
from tests.gguf_writer import write_gguf
from tests.hub_server import Hub
from tests.llama2c_writer import random_llama
from tests.sentencepiece_model import SIZE
from tests.tiny_model import write_tiny_model

COMMAND = [sys.executable, "-W", "error", "-m", "roofline"]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def hub(hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with one model as safetensors and another in two quantisations."""
    monkeypatch.setenv("ROOFLINE_CACHE", str(tmp_path / "own"))
    hub_server.add_folder("org/tiny", write_tiny_model(tmp_path / "tiny"))
    quants = tmp_path / "quants"
    quants.mkdir()
    for kind in ("F32", "Q8_0"):
        write_gguf(random_llama(vocab_size=SIZE), quants / f"m-{kind}.gguf", matrices=kind)
    hub_server.add_folder("org/quants", quants)
    return hub_server


def roofline(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **environment},
        text=True,
    )


def tokens(model: str | Path, **options: str) -> list[int]:
    with LLM(str(model), max_num_seqs=1, **options) as llm:
        return llm.generate("once upon", GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("reference", "copy", "weights"),
    [
        ("org/tiny", "tiny", "model.safetensors"),
        ("org/quants", "quants/m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("org/quants:f32", "quants/m-F32.gguf", "m-F32.gguf"),
    ],
)
def test_a_model_of_the_hub_answers_as_its_files_do(
    hub: Hub, reference: str, copy: str, weights: str, tmp_path: Path
) -> None:
    assert tokens(reference, revision="main") == tokens(tmp_path / copy)
    assert hub.fetched()[-1] == weights


def test_commands_find_the_hub_and_the_cache_by_the_environment(hub: Hub, tmp_path: Path) -> None:
    pulled = roofline("pull", "org/tiny")
    assert (pulled.returncode, pulled.stderr.count("\n")) == (0, 1)
    folder = Path(pulled.stdout.removesuffix("\n"))
    assert folder.is_relative_to(os.environ["HF_HOME"]) and (folder / "config.json").is_file()
    assert [path for _, path, _ in hub.requests if "org/tiny" not in path] in (
        [],
        ["/api/agent-harnesses"],  # the library's, for its user agent
    )
    offline = {"HF_HUB_OFFLINE": "1"}
    out = tmp_path / "int8"
    assert roofline("quantize", "org/tiny", str(out), **offline).returncode == 0
    assert (out / "model.safetensors").is_file()
    assert "org/tiny" in roofline("ls", **offline).stdout
    missing = roofline("run", "org/quants:Q8_0", "hi", **offline)
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (1, "", 1)
    assert "HF_HUB_OFFLINE is set" in missing.stderr and os.environ["HF_HOME"] in missing.stderr
    assert roofline("rm", "org/tiny", "--yes", **offline).returncode == 0
    assert not folder.exists()


def test_fit_needs_no_weights(hub: Hub) -> None:
    report = roofline("fit", "org/tiny", "--revision", "main", "--json")
    assert json.loads(report.stdout)["parameters"] == 90_560
    assert "model.safetensors" not in hub.fetched()


def test_two_processes_fetching_at_once_both_have_it(hub: Hub) -> None:
    pulls = [
        subprocess.Popen([*COMMAND, "pull", "org/tiny"], stdout=subprocess.PIPE) for _ in range(2)
    ]
    paths = {process.communicate(timeout=60)[0] for process in pulls}
    assert [process.returncode for process in pulls] == [0, 0]
    assert len(paths) == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_fetch_that_is_stopped_ends_at_once_and_goes_on_next_time(
    hub: Hub, stop: signal.Signals
) -> None:
    repository = hub.repositories["org/tiny"]
    repository.stalled["model.safetensors"] = 1000
    with subprocess.Popen([*COMMAND, "pull", "org/tiny"], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while "model.safetensors" not in [
            path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET"
        ]:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(stop)
        _, complaints = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert complaints.endswith(b"roofline: interrupted\n")
        assert not list(huggingface.cache_folder().rglob("*.incomplete"))
    repository.stalled.clear()
    hub.fetched()
    assert roofline("pull", "org/tiny").returncode == 0
    assert hub.fetched() == ["model.safetensors"]
