"""What the benchmarks make of their measurements; the measuring itself is not repeated here."""

import math
import sys
from pathlib import Path
from typing import Any

import growth
import peer_process
import peers
import perplexity
import pytest
import yardsticks
from peer_process import Peer, PeerError

from roofline.models.opening import describe

MACHINE = {"read_gb_s": 20.0, "bfloat16_gmac_s": 100.0, "prefill_512_gmac": 50.0}
FACTS = {
    "roofline": {"weight_bytes": 1e8, "activations": "bfloat16"},
    "llama.cpp Q8_0": {"weight_bytes": 2e8},
}


@pytest.mark.parametrize(
    ("figure", "rate"),
    [("decode_1", 127 / 3), ("prefill_512", 512), ("decode_16", 16 * 63 / 3), ("requests_32", 512)],
)
def test_a_rate_counts_what_its_time_was_spent_on(figure: str, rate: float) -> None:
    assert peers.FIGURES[figure].rate(first_s=1.0, last_s=4.0) == pytest.approx(rate)


def test_a_summary_has_medians_ratios_and_fractions_of_the_machine() -> None:
    found = {
        "roofline": {"decode_1": [90.0, 100.0, 500.0], "prefill_512": [512.0], peers.START: [1.0]},
        "llama.cpp Q8_0": {"decode_1": [50.0], peers.START: [2.0]},
    }
    report = peers.summary(found, FACTS, MACHINE)
    ours, theirs = report["peers"].values()
    assert (ours["decode_1"], ours["decode_1_of_read"], ours["prefill_512_of_peak"]) == (
        100.0, pytest.approx(0.5), pytest.approx(0.5),
    )  # fmt: skip
    assert theirs["decode_1_of_read"] == pytest.approx(0.5)
    # More tokens a second and less time to the first are both better than one.
    assert report["ratios"] == {"roofline": {"llama.cpp Q8_0": {"decode_1": 2.0, peers.START: 2.0}}}


def test_a_yardstick_is_the_higher_of_two() -> None:
    assert peers.best({"isa": "avx2", "a": 1.0, "b": 4.0}, {"isa": "avx2", "a": 2.0, "b": 3.0}) == {
        "a": 2.0, "b": 4.0,
    }  # fmt: skip


def test_a_table_has_a_dash_where_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    peers.print_table("x", ("decode_1", "prefill_512"), {"one": {"decode_1": 123.456}})
    assert capsys.readouterr().out.splitlines()[-2:] == ["| one | 123.5 | - |", ""]


FAKE = """
import json, sys, time
print(json.dumps({"facts": {"threads": sys.argv[3]}}), flush=True)
for line in sys.stdin:
    seconds = json.loads(line)["tokens"]
    if seconds > 1:
        sys.exit("the model\\nis too small")
    time.sleep(60 * seconds)
    print(json.dumps({"first_s": 1.0, "last_s": 2.0}), flush=True)
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    monkeypatch.setattr(peer_process, "PROGRAM", program)
    made = Peer("any:variant", sys.executable, [], threads=2)
    assert 0 < made.start(tmp_path / "log", limit_s=60) < 60
    yield made
    made.stop()


def test_a_peer_says_what_it_is_and_answers(peer: Peer) -> None:
    assert peer.facts == {"threads": "2"}
    assert peer.ask({"tokens": 0}, limit_s=60) == {"first_s": 1.0, "last_s": 2.0}
    assert peer.rss_anon_bytes() > 1e6


@pytest.mark.parametrize(("tokens", "why"), [(1, "no answer in 0 s"), (2, "is too small")])
def test_a_peer_that_is_slow_or_dies_is_ended_and_says_why(
    peer: Peer, tokens: int, why: str
) -> None:
    with pytest.raises(PeerError, match=why):
        peer.ask({"tokens": tokens}, limit_s=0.2 if tokens == 1 else 60)
    assert not peer.is_running


def point(weights_ms: float, kv_ms: float, arithmetic_ms: float, host_ms: float) -> growth.Point:
    return growth.Point(
        "bfloat16", 128, 1, 100.0, 10.0, weights_ms, kv_ms, arithmetic_ms, host_ms
    )  # fmt: skip


@pytest.mark.parametrize(
    ("times", "limit", "fraction"),
    [
        ((4.0, 3.0, 6.0, 1.0), "weights", 0.7),
        ((3.0, 4.0, 6.0, 1.0), "KV cache", 0.7),
        ((3.0, 1.0, 6.0, 1.0), "arithmetic", 0.6),
        ((3.0, 1.0, 2.0, 5.0), "host", 0.5),
    ],
)
def test_a_point_is_limited_by_what_takes_longest(
    times: tuple[float, float, float, float], limit: str, fraction: float
) -> None:
    assert (point(*times).limit, point(*times).of_limit) == (limit, pytest.approx(fraction))


def test_the_work_of_a_model_is_that_of_its_matrices() -> None:
    model, _ = describe("llama-110m")
    alone, two = (yardsticks.products(model, n, sampled=0, seen=0) for n in (1, 2))
    head = yardsticks.products(model, 1, sampled=1, seen=0) - alone
    assert two == 2 * alone
    assert head == model.vocab_size * model.hidden_size
    assert yardsticks.prompt_products(model, 1) == yardsticks.products(model, 1, 1, 1)


def test_perplexities_are_compared_window_by_window() -> None:
    base = {"stride": 10, "window_nlls": [10.0, 20.0]}
    change, error = perplexity.difference(base, {"window_nlls": [10.1, 20.3]})
    assert change == pytest.approx(math.expm1(0.02))
    assert error == pytest.approx(0.01)
