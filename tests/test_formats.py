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
from tests.llama2c_writer import LAYOUTS, interleave, random_llama, write_model
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


@torch.inference_mode()
def test_a_split_gguf_answers_as_the_unsplit_one(tmp_path: Path) -> None:
    peer = random_llama(vocab_size=SIZE)
    write_gguf(peer, tmp_path / "model.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(parts) == 3 and not (tmp_path / "model.gguf").exists()
    for part in parts[:2]:
        assert_answers_of(peer, part)


@torch.inference_mode()
def test_a_file_in_the_other_rotary_order_answers_right_when_told(tmp_path: Path) -> None:
    """Hugging Face's rows through an exporter that leaves them as they are."""
    path, peer = written(tmp_path, "kuiper")
    moved = random_llama(vocab_size=SIZE)
    for layer in moved.model.layers:
        for projection, heads in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, 2)):
            projection.weight.copy_(interleave(projection.weight, heads))
    write_model(moved, path, "kuiper")
    ids = trained().encode(PROMPTS[0])
    answers: list[list[int]] = []
    for order in ("interleaved", "auto"):
        with LLM(str(path), rotary_order=order, **FLOATS) as llm:
            answers.append(llm.generate([ids], GREEDY)[0].outputs[0].token_ids)
    logits = peer(torch.tensor([ids + answers[0]])).logits[0]
    assert answers[0] == logits[len(ids) - 1 : -1].argmax(-1).tolist()
    assert answers[1] != answers[0]


def test_a_file_smaller_than_int8_says_so_once_on_a_terminal_as_it_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(random_llama(vocab_size=SIZE), tmp_path / "[model].gguf", matrices="Q4_0")
    for terminal in (False, True):
        monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
        LLM(str(path)).close()
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("[model].gguf: 0.1 MB of weights in the file (Q4_0) take") == terminal
        assert terminal or err == ""


def test_run_fit_and_quantize_take_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = written(tmp_path, "v2")
    monkeypatch.setattr(figures, "bandwidth_gb_s", lambda threads, **_: 20.0)
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
