"""How a training process lives among others: threads, determinism, device, and not outliving the run that started it."""

import ctypes
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sasrec.errors import UserError
from sasrec.guardian import stop_if_orphaned


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed instead of returning it to the kernel. Every tensor of more than 128 KiB is
    otherwise mapped anew, and its pages are cleared again at first touch."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def set_up(threads: int, device: str) -> torch.device:
    """Fix the number of threads and deterministic algorithms (another thread count sums in another order and gives other
    bits), and choose the device. Raises UserError where `cuda` is asked for and there is none."""
    keep_freed_memory()
    # oneDNN keeps code and scratch memory for each shape of a product that it has met, by default of 1,024, and batches have
    # ever new shapes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.set_num_threads(threads)
    # What torch.use_deterministic_algorithms does, without importing torch's compiler to tell it, too: that takes seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    # Nothing here reads memory before writing it; filling every new tensor with NaN first would cost 8 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: device is cuda, but no GPU is visible; set device: auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Job:
    """resume: where the run keeps what it has reached. log: prints a line, and keeps it with the time in data/logs."""

    resume: Path
    log: Callable[[str], None]


@contextmanager
def run_once(name: str) -> Iterator[Job]:
    """The one run of `name` on this checkout: waits for another that still holds the lock, which the kernel frees with its
    holder. On success the resume file is removed; after a failure it stays, for the next run."""
    folder = Path("data/resume")
    folder.mkdir(parents=True, exist_ok=True)
    Path("data/logs").mkdir(parents=True, exist_ok=True)
    resume = folder / f"{name}.safetensors"
    with open(folder / f"{name}.lock", "w") as lock, open(f"data/logs/{name}.log", "a", encoding="utf-8") as log:

        def note(line: str) -> None:
            print(line, flush=True)
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=log, flush=True)

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"waiting for another run of {name} to stop")
            fcntl.flock(lock, fcntl.LOCK_EX)
        stop_if_orphaned()
        yield Job(resume, note)
        resume.unlink(missing_ok=True)
