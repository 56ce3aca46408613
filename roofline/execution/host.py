"""What this host is: its name, its CPU and what that can do. No torch here."""

import platform
from pathlib import Path


def cpu_fields() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo (`model name`, `flags`); empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return {}
    pairs = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_model() -> str:
    """The CPU's name."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()
