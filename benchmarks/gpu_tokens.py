"""A model's greedy tokens on the GPU beside the CPU's: the CPU's travel in a file.

    python benchmarks/gpu_tokens.py smollm2-135m tokens.json            # where there is no GPU
    python benchmarks/gpu_tokens.py smollm2-135m tokens.json --check    # on a GPU

Twenty prompts of 64 tokens. A token that differs is shown with the log-probabilities that the CPU
gave its own and its second choice: close ones are rounding, and what follows another token is
another text. The last line is one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from roofline import LLM, SamplingParams
from tests.prompts import PROMPTS

TOKENS = 64


def main() -> None:
    """Write the file, or hold this machine's tokens against it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    found = answers(asked.model, "cuda" if asked.check else "cpu")
    if not asked.check:
        asked.file.write_text(json.dumps(found))
        print(json.dumps({"benchmark": "gpu_tokens", "written": len(found)}))
        return
    known = json.loads(asked.file.read_text())
    differences = [first_difference(*pair) for pair in zip(known, found, strict=True)]
    for prompt, difference in zip(PROMPTS, differences, strict=True):
        print(f"{prompt[:30]!r}: {difference or f'the same {TOKENS} tokens'}")
    apart = [d for d in differences if d is not None]
    same = len(differences) - len(apart)
    print(json.dumps({"benchmark": "gpu_tokens", "same": same, "differences": apart}))


def answers(model: str, device: str) -> list[dict[str, Any]]:
    """Of each prompt the tokens, and of each token the two likeliest with their log-probability."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    with LLM(model, device=device) as llm:
        outputs = [output.outputs[0] for output in llm.generate(list(PROMPTS), params)]
    found = []
    for output in outputs:
        assert output.logprobs is not None
        likeliest = [
            sorted(((p.logprob, token) for token, p in place.items()), reverse=True)[:2]
            for place in output.logprobs
        ]
        found.append({"tokens": list(output.token_ids), "likeliest": likeliest})
    return found


def first_difference(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any] | None:
    """Where two answers part, and by how much the CPU preferred its token; None: nowhere."""
    pairs = zip(known["tokens"], found["tokens"], strict=True)
    place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if place is None:
        return None
    (first, _), (second, runner_up) = known["likeliest"][place]
    return {
        "place": place,
        "gap": first - second,
        "is_second_choice": found["tokens"][place] == runner_up,
    }


if __name__ == "__main__":
    main()
