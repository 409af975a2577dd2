"""What every stage script shares: its declared parameters, and errors that end with one clear line."""

import errno
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from sasrec.config import Study, check_names, known_methods
from sasrec.errors import UserError
from sasrec.mapping import from_mapping

PARAMS = Path("params.yaml")


class Once(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, as DVC does with another message."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # `<<` takes in another mapping, whose keys may stand here again.
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key, name in zip(own, keys, strict=True):
            if keys.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {name} stands there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class Declared:
    """A view of the study that gives only the sections a stage declares, so that dvc.yaml cannot fall behind. Of a section that
    is declared key by key, the others have their defaults."""

    def __init__(self, study: Study, sections: Sequence[str]) -> None:
        self._study = study
        self._whole = frozenset(sections)
        self._sections = frozenset(section.split(".")[0] for section in sections)

    def __getattr__(self, name: str) -> Any:
        if name == "of_model" and {"model", "train", "per_model"} <= self._sections:
            return self._study.of_model
        if name not in self._sections:
            raise AttributeError(f"this stage reads '{name}' but does not declare it")
        section = getattr(self._study, name)
        if name in self._whole or not is_dataclass(section):
            return section
        keys = [declared.partition(".")[2] for declared in self._whole if declared.startswith(f"{name}.")]
        kind: Any = type(section)
        return kind(**{key: getattr(section, key) for key in keys})


def whole(study: Study) -> Study:
    """All of a study of which a stage was given what it declares: to refuse what cannot be done. Nothing of it may change what
    the stage writes."""
    return study._study if isinstance(study, Declared) else study


def read_study(path: Path = PARAMS) -> Study:
    """The whole of params.yaml, checked. Raises UserError with the key that is wrong."""
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), Once)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run from the root of the project") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path} is not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    study = from_mapping(Study, mapping, "")
    check_names(study, known_methods())
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
    except (MemoryError, RuntimeError) as error:
        # That torch cannot have memory is of no type of its own on a CPU.
        said = ("allocate memory", "out of memory", "size calculation overflowed")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in said):
            raise
        sys.exit(f"error: not enough memory ({error}); use smaller sizes in params.yaml or a machine with more")
    except OSError as error:
        if error.errno == errno.ENOENT and str(error.filename).startswith("data/"):
            sys.exit(f"error: {error.filename} does not exist; dvc repro runs the stages that make it")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        denied = error.errno in (errno.EACCES, errno.EROFS)
        verb, adjective = "write", "writable"
        if denied and error.filename and os.path.isfile(error.filename) and not os.access(error.filename, os.R_OK):
            verb, adjective = "read", "readable"
        advice = f"make it {adjective}" if denied else "free some disk space"
        sys.exit(f"error: cannot {verb} {error.filename or 'an output'}: {error.strerror}; {advice} and run again")
