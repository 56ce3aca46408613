"""What each weight format costs in perplexity: one table, the last line one JSON document.

    python benchmarks/perplexity.py smollm2-135m wikitext2-test.txt --windows 100

Runs `roofline ppl` once a row; a window of 1,024 tokens takes seconds on two cores.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

ROWS = {
    "float32": ["--quantization", "none", "--dtype", "float32"],
    "bfloat16": ["--quantization", "none"],
    "INT8, as the file has it, else g = 128": [],
    "INT8 g = 128": ["--group-size", "128"],
    "INT8 g = 64": ["--group-size", "64"],
    "INT8 g = 32": ["--group-size", "32"],
    "INT8 channel": ["--group-size", "channel"],
}


def main() -> None:
    """Measure every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--windows", type=int, default=100)
    asked = parser.parse_args()
    measured: dict[str, dict[str, Any]] = {}
    print("| weights | perplexity | against float32 |\n|---|---|---|")
    for name, options in ROWS.items():
        command = ["ppl", asked.model, asked.file, "--windows", str(asked.windows), "--json"]
        run = [sys.executable, "-m", "roofline", *command, *options]
        done = subprocess.run(run, stdout=subprocess.PIPE, check=True)
        measured[name] = json.loads(done.stdout)
        change = measured[name]["perplexity"] / measured["float32"]["perplexity"] - 1
        print(f"| {name} | {measured[name]['perplexity']:.4f} | {change:+.3%} |", flush=True)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
