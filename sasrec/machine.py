"""What a measurement says of the processor it was made on, where the system tells it."""

import platform
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
# What decides how fast integers are multiplied.
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def processor(path: Path = CPUINFO) -> str:
    """Its own name; elsewhere the architecture's."""
    return _first(path, "model name") or platform.processor() or platform.machine()


def processor_flags(path: Path = CPUINFO) -> str:
    """Which of FLAGS it has, separated by blanks; empty where the system does not say."""
    found = _first(path, "flags").split()
    return " ".join(flag for flag in FLAGS if flag in found)


def gpu(device: str) -> str | None:
    """The name of the GPU that `device` of params.yaml puts training on; None where that is the processor."""
    return torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None


def _first(path: Path, name: str) -> str:
    """The value of the first line of that name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
