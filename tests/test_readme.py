"""What the README shows in Python is run as it stands, on the model it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_it_stands(example: str, smollm2_path: Path) -> None:
    code = example.replace('"smollm2-135m"', repr(str(smollm2_path)))
    assert code != example
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_both_doors_are_shown() -> None:
    assert [name in "".join(EXAMPLES) for name in ("LLM(", "AsyncLLM(")] == [True, True]
