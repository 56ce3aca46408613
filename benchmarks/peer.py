"""One peer of `peers.py`, in a process and an environment of its own.

    python benchmarks/peer.py llama_cpp:Q8_0 --threads 2 --gguf FILE --folder FOLDER

Loads the engine, answers one token and says what it is. Then each line of stdin, a JSON document
{prompt_tokens, sequences, tokens, seed}, is answered on stdout by {first_s, last_s}.
"""

import argparse
import ctypes
import importlib
import json
import os
import random
import signal
import sys
from pathlib import Path

from peer_engines import Loaded, Weights

PR_SET_PDEATHSIG = 1
FIRST = {"prompt_tokens": 16, "sequences": 1, "tokens": 1, "seed": 0}


def main() -> None:
    """Load and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", help="module of peer_engines, colon, variant")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even while it is stopped
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an engine prints is no answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    module, _, variant = arguments.engine.partition(":")
    weights = Weights(arguments.gguf, arguments.folder)
    del sys.path[0]  # benchmarks/: transformers would take our kernels.py for a package of its own
    engine = importlib.import_module(f"peer_engines.{module}")
    loaded = engine.load(weights, arguments.threads, variant)
    print(json.dumps(answer(loaded, **FIRST) | {"facts": loaded.facts}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(loaded, **json.loads(line))), file=answers)


def answer(
    loaded: Loaded, prompt_tokens: int, sequences: int, tokens: int, seed: int
) -> dict[str, float]:
    """Answer random prompts of one length; a seed of its own finds nothing in a cache."""
    choose = random.Random(seed).choices
    prompts = [choose(range(100, 40_000), k=prompt_tokens) for _ in range(sequences)]
    first_s, last_s = loaded.generate(prompts, tokens)
    return {"first_s": first_s, "last_s": last_s}


if __name__ == "__main__":
    main()
