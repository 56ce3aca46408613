"""Files of llama2.c through the doors: run, fit, quantize, and the Python API; and Llama 2's GGUF.

What they share is a vocabulary of SentencePiece.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from roofline import LLM, SamplingParams
from roofline.cli import figures
from roofline.cli.fit import fit
from roofline.cli.quantize import quantize
from roofline.cli.run import run
from tests.gguf_writer import write_gguf
from tests.llama2c_writer import LAYOUTS, random_llama, write_model
from tests.sentencepiece_model import BOS, SIZE, trained, write_tokenizer_bin

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
FLOATS: dict[str, Any] = {"quantization": "none", "dtype": "float32"}
PROMPTS = ["The miller's daughter", "x", "  aaaa 水車 😀\n"]


def written(folder: Path, layout: str) -> tuple[Path, LlamaForCausalLM]:
    model = random_llama(vocab_size=SIZE)
    write_tokenizer_bin(folder / "tokenizer.bin")
    return write_model(model, folder / "model.bin", layout), model


def assert_answers_of(peer: Any, path: Path) -> None:
    """Ids are sentencepiece's, tokens the peer's, and prompt and answer the decoded whole."""
    with LLM(str(path), **FLOATS) as llm:
        answers = llm.generate(PROMPTS, GREEDY)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids, output = answer.prompt_token_ids, answer.outputs[0]
        assert ids == [BOS, *trained().encode(prompt)]
        logits = peer(torch.tensor([ids + output.token_ids])).logits[0]
        assert output.token_ids == logits[len(ids) - 1 : -1].argmax(-1).tolist()
        whole = llm.get_tokenizer().decode(ids + output.token_ids)
        unfinished = whole.removeprefix(prompt + output.text)
        assert unfinished in ("", "\ufffd", "\ufffd\ufffd")


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_text_in_text_out_is_that_of_transformers_and_sentencepiece(
    tmp_path: Path, layout: str
) -> None:
    path, peer = written(tmp_path, layout)
    assert_answers_of(peer, path)


@torch.inference_mode()
def test_a_gguf_with_pieces_and_scores_answers_the_same(tmp_path: Path) -> None:
    peer = random_llama(vocab_size=SIZE)
    assert_answers_of(peer, write_gguf(peer, tmp_path / "model.gguf"))


def test_run_fit_and_quantize_take_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = written(tmp_path, "v2")
    monkeypatch.setattr(figures, "bandwidth_gb_s", lambda: 20.0)
    folder = tmp_path / "quantised"
    quantize(str(path), str(folder), json=True)
    capsys.readouterr()
    answers, plans = list[list[int]](), list[Any]()
    for model in (path, folder):
        run(str(model), PROMPTS[0], raw=True, json=True, max_tokens=8, ignore_eos=True)
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
        fit(str(model), json=True)
        plans.append(json.loads(capsys.readouterr().out)["ranks"])
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]
    assert plans[0] == plans[1]


def test_a_story_ends_in_the_token_that_llama2c_ends_it_with(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "v0")
    only_bos = SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[BOS])
    with LLM(str(path), **FLOATS) as llm:
        output = llm.generate("x", only_bos)[0].outputs[0]
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("", "stop", 1)
