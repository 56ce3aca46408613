import json
import resource
from pathlib import Path

import pytest

from roofline import LLM, SamplingParams
from roofline.cli.quantize import quantize
from roofline.config import EngineConfig
from roofline.errors import CapacityError, UnsupportedError, UsageError
from roofline.models.opening import open_model
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("group_size", [32, "channel"])
def test_what_is_written_answers_as_what_is_quantised_at_load(
    group_size: int | str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    quantize(model, str(out), json=True, group_size=group_size)
    report = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in out.iterdir())
    assert report == {"model": model, "out": str(out), "bytes": size}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    answers = []
    for source, asked in ((model, group_size), (str(out), "auto")):
        with LLM(source, max_num_seqs=1, group_size=asked) as llm:
            answers.append(llm.generate(["Hello"], params)[0].outputs)
    assert answers[0] == answers[1]


def test_what_was_asked_for_beside_the_weights_is_written_too(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = tmp_path / "generation.json"
    generation.write_text('{"do_sample": false, "max_new_tokens": 7, "eos_token_id": [3, 5]}')
    out = str(tmp_path / "out")
    options = {"chat_template": "own {{ messages[0].content }}"}
    quantize(model, out, json=True, generation_config=str(generation), **options)
    opened = open_model(out, EngineConfig())
    assert opened.sampling_defaults == {"temperature": 0.0, "max_tokens": 7}
    assert {3, 5} < set(opened.config.eos_token_ids)
    assert opened.tokenizer is not None
    assert opened.tokenizer.render_chat([{"role": "user", "content": "x"}]) == "own x"
    opened.checkpoint.close()
    quantize(model, str(tmp_path / "plain"), json=True)
    assert not (tmp_path / "plain" / "generation_config.json").exists()


def test_a_person_is_told_where_and_how_much(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(model, str(tmp_path / "out"))
    assert capsys.readouterr() == (f"{tmp_path / 'out'}: 0.1 MB\n", "")


def test_what_exists_is_never_written_over(model: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        quantize(model, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_full_disk_is_one_line_and_leaves_nothing(model: str, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(CapacityError, match=str(tmp_path / "out")):
            quantize(model, str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_group_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="group_size 48 is not supported"):
        quantize("nothing is opened", str(tmp_path / "out"), group_size=48)
