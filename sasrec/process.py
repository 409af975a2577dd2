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


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed instead of returning it to the kernel. Every tensor of more than 128 KiB is
    otherwise mapped anew, and its pages are cleared again at first touch: up to a fifth of a training step."""
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
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before writing it; filling every new tensor with NaN first would cost 8 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: device is cuda, but no GPU is visible; set device: auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _parent(pid: int) -> tuple[str, int] | None:
    """Name and parent of a process, or None where /proc does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, rest = text[text.index("(") + 1 :].rsplit(")", 1)
    return name, int(rest.split()[1])


class Guardian:
    """Tells whether the run that started this process is still there.

    When dvc is killed with -9 its child goes on as an orphan, and the next `dvc repro` starts a second trainer beside it.
    Under DVC (it sets DVC_STAGE) the process therefore watches its parent, and, where that is only the shell that dvc
    started the command with, the shell's parent too.
    """

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.grandparent: int | None = None
        self.watching = "DVC_STAGE" in os.environ
        found = _parent(self.parent)
        if found and found[0] in ("sh", "bash", "dash", "zsh", "ash"):
            self.grandparent = found[1]

    def gone(self) -> bool:
        if not self.watching:
            return False
        if os.getppid() != self.parent:
            return True
        if self.grandparent is None:
            return False
        found = _parent(self.parent)
        return found is not None and found[1] != self.grandparent


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
        yield Job(resume, note)
        resume.unlink(missing_ok=True)
