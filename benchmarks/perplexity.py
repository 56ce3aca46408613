"""What each weight format costs in perplexity: one table, the last line one JSON document.

    python benchmarks/perplexity.py smollm2-135m wikitext2-test.txt --windows 100

Runs `roofline ppl` once a row; a window of 1,024 tokens takes seconds on two cores. Differences are
against the first row, their standard error that of the paired difference over windows. `--rows`
picks some by name.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROWS = {
    "float32": ["--quantization", "none", "--dtype", "float32"],
    "bfloat16": ["--quantization", "none"],
    "INT8, as the file has it, else g = 128": [],
    "INT8 g = 128": ["--group-size", "128"],
    "INT8 g = 64": ["--group-size", "64"],
    "INT8 g = 32": ["--group-size", "32"],
    "INT8 channel": ["--group-size", "channel"],
    "INT8 g = 128, activations INT8": ["--group-size", "128", "--activations", "int8"],
    "INT8, as the file has it, activations INT8": ["--activations", "int8"],
}


def main() -> None:
    """Measure every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    asked = parser.parse_args()
    measured: dict[str, dict[str, Any]] = {}
    print("| weights | nll | perplexity | against the first | ± |\n|---|---|---|---|---|")
    for name in asked.rows:
        command = ["ppl", asked.model, asked.file, "--windows", str(asked.windows), "--json"]
        run = [sys.executable, "-m", "roofline", *command, *ROWS[name]]
        done = subprocess.run(run, stdout=subprocess.PIPE, check=True)
        measured[name] = found = json.loads(done.stdout)
        change, error = difference(measured[asked.rows[0]], found)
        print(f"| {name} | {found['nll']:.6f} | {found['perplexity']:.4f} | {change:+.3%} | "
              f"{error:.3%} |", flush=True)  # fmt: skip
    print(json.dumps(measured))


def difference(base: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """How much larger the other's perplexity is, and the standard error of that."""
    scored = base["stride"]
    pairs: Sequence[tuple[float, float]] = list(
        zip(base["window_nlls"], other["window_nlls"], strict=True)
    )
    apart = [(theirs - ours) / scored for ours, theirs in pairs]
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return math.expm1(statistics.fmean(apart)), error


if __name__ == "__main__":
    main()
