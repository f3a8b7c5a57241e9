"""The machine that a benchmark runs on: its name, and the memory that a process or a GPU's allocator holds there."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from pathlib import Path

import torch

# The allocator of glibc: tensors are mapped one by one and unmapped when freed, so that the resident size is what is alive.
EAGER_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def device() -> str:
    """The machine in words, and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def settle() -> None:
    """Give back whatever is free."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def held() -> int:
    """Bytes that the process holds, or the GPU's allocator."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def forget_peak() -> None:
    """Start the high-water mark anew; where that is not allowed, what came before counts if it was more."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most that `held` was, since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> int:
    """Bytes of this process, as Linux counts them."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("memory is measured on Linux or on a GPU; give --measure time")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
