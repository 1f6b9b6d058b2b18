"""This machine's hardware, found without importing torch."""

from __future__ import annotations

import os
import platform
import re
import time
from functools import cache
from pathlib import Path


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_names() -> list[str]:
    """Return the name in CUDA_VISIBLE_DEVICES of each NVIDIA GPU available to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = _driver_gpus()
    if visible is None:
        return [str(index) for index in range(present)]
    # At most as many as are present: torch does not see further ones either.
    return [name for name in (part.strip() for part in visible.split(",")) if name and name != "-1"][:present]


def gpu_count() -> int:
    """Return the number of NVIDIA GPUs available to this process."""
    return len(gpu_names())


def cpu_model() -> str:
    """Return the processor's name, if the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def emulates_bf16() -> bool:
    """Return whether the processor lacks bfloat16 products; False where the system does not tell (Linux does)."""
    try:
        flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return False
    return not flags & {"amx_bf16", "avx512_bf16"}


def process_age() -> float | None:
    """Return the seconds since this process was started or forked, to a hundredth; None without /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no /proc, no such clock
        return None


@cache
def _driver_gpus() -> int:
    # Device files: a container sees only those of its own GPUs.
    return sum(re.fullmatch(r"nvidia\d+", entry.name) is not None for entry in Path("/dev").iterdir())
