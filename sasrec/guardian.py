"""Whether the run that started this process is still there.

When dvc is killed with -9 its child goes on as an orphan, and the next `dvc repro` starts a second trainer beside it. Under
DVC (it sets DVC_STAGE) the process therefore watches its parent, and, where that is only the shell that dvc started the
command with, the shell's parent too. They are noted when this module is first imported, which the stages do before all else.
"""

import os
from pathlib import Path

from sasrec.errors import UserError


def _name_and_parent(pid: int) -> tuple[str, int] | None:
    """Name and parent of a process, or None where /proc does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, rest = text[text.index("(") + 1 :].rsplit(")", 1)
    return name, int(rest.split()[1])


class Guardian:
    """Notes the ancestors of this process at its making."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.grandparent: int | None = None
        self.watching = "DVC_STAGE" in os.environ
        found = _name_and_parent(self.parent)
        if found and found[0] in ("sh", "bash", "dash", "zsh", "ash"):
            self.grandparent = found[1]

    def gone(self) -> bool:
        if not self.watching:
            return False
        if os.getppid() != self.parent:
            return True
        if self.grandparent is None:
            return False
        found = _name_and_parent(self.parent)
        return found is not None and found[1] != self.grandparent


_guardian = Guardian()


def stop_if_orphaned() -> None:
    """Raise UserError where the run that started this process is gone."""
    if _guardian.gone():
        raise UserError("the run that started this stage is gone; stopping (the next run resumes)")
