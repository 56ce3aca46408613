"""What attention and sampling launch compiles for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("capability", ["80", "90"])
def test_attention_and_sampling_compile(capability: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    script = str(ROOT / "tests" / "gpu_attention_launches.py")
    made = subprocess.run(
        [sys.executable, script, capability], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-2000:]
    kernels = {line.split()[0] for line in made.stdout.splitlines()}
    assert kernels >= {"plan_tasks", "decode", "prompt", "truncate_rows", "largest_of_chunks"}
