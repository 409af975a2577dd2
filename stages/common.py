"""What every stage script shares: its declared parameters, and errors that end with one clear line."""

import errno
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from sasrec.config import Study, check_names
from sasrec.errors import UserError
from sasrec.mapping import from_mapping

PARAMS = Path("params.yaml")


class Declared:
    """A view of the study that gives only the sections a stage declares, so that dvc.yaml cannot fall behind."""

    def __init__(self, study: Study, sections: Sequence[str]) -> None:
        self._study = study
        self._sections = frozenset(section.split(".")[0] for section in sections)

    def __getattr__(self, name: str) -> Any:
        if name == "of_model" and {"model", "train", "per_model"} <= self._sections:
            return self._study.of_model
        if name not in self._sections:
            raise AttributeError(f"this stage reads '{name}' but does not declare it")
        return getattr(self._study, name)


def read_study(path: Path = PARAMS) -> Study:
    """The whole of params.yaml, checked. Raises UserError with the key that is wrong."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run from the root of the project") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    study = from_mapping(Study, mapping, "")
    # A method's file says whether it trains; importing it to see would import torch.
    files = Path("sasrec/quant").glob("*.py")
    check_names(study, {file.stem for file in files if "\nTRAINS = " in file.read_text(encoding="utf-8")})
    return study


def run(main: Callable[..., None], sections: Sequence[str]) -> None:
    """Call `main(study, *command line)`; end with one line and status 1 where the input or the machine is at fault. Where
    `main` takes other arguments, or help is asked for that it does not give itself, say how it is called."""
    _, *takes = inspect.signature(main).parameters.values()
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes):
        wanted = " ".join(["", *(parameter.name.upper() for parameter in takes)])
        usage = f"usage: python -m stages.{Path(sys.argv[0]).stem}{wanted}"
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(f"{usage}\n\n{inspect.getmodule(main).__doc__}")
            return
        if len(sys.argv) - 1 != len(takes):
            sys.exit(f"error: {len(sys.argv) - 1} arguments, not {len(takes)}; {usage}")
    try:
        main(cast(Study, Declared(read_study(), sections)), *sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; run again to go on", file=sys.stderr)
        sys.exit(130)
    except MemoryError as error:
        sys.exit(f"error: not enough memory ({error}); use smaller sizes in params.yaml or a machine with more")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        advice = "make it writable" if error.errno in (errno.EACCES, errno.EROFS) else "free some disk space"
        sys.exit(f"error: cannot write {error.filename or 'an output'}: {error.strerror}; {advice} and run again")
