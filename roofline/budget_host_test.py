"""How much memory a process may still take, by the kernel and by its cgroups."""

import os
from pathlib import Path

import pytest

from roofline.budget import available_host_bytes


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 90 kB\nMemAvailable:   80 kB\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 80 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 80 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "70000\n",
                f"{V2}/a/memory.max": "75000\n",
                f"{V2}/a/memory.current": "71000\n",
                f"{V2}/a/memory.stat": "anon 5\ninactive_file 500\n",
            },
            75000 - 71000 + 500,
        ),
        (
            {  # in a container that sees its own group as the root
                "proc/self/cgroup": "0::/elsewhere\n",
                f"{V2}/memory.max": "3000\n",
                f"{V2}/memory.current": "4000\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job\n0::/\n",
                f"{V1}/memory.limit_in_bytes": str(2**63 - 4096),
                f"{V1}/memory.usage_in_bytes": "1",
                f"{V1}/job/memory.limit_in_bytes": "60000",
                f"{V1}/job/memory.usage_in_bytes": "50000",
                f"{V1}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 700\n",
            },
            10700,
        ),
    ],
    ids=["no cgroup", "no limit", "v2 of a parent", "v2 overdrawn", "v1"],
)
def test_available_memory_is_within_the_cgroups_limit(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert available_host_bytes(write(tmp_path, MEMINFO | files)) == expected


def test_available_memory_without_proc_is_what_the_system_says(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_host_bytes(tmp_path) <= whole
    assert 0 < available_host_bytes() <= whole
