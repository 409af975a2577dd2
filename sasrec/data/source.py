"""source.json, which tells the prepare stage what the raw folder holds.

`name` of the data set, `format`, `file`, `extras`, `original` (the file or archive they are from), its
`sha256`, whether it is `local`, and the data set's own `times`. No time, host or absolute path, so that the folder is
the same wherever it is made.
"""

from dataclasses import dataclass
from pathlib import Path

from sasrec.errors import UserError
from sasrec.files import read_json


@dataclass(frozen=True)
class Source:
    name: str
    format: str
    file: str
    extras: list[str]
    original: str
    sha256: str
    local: bool
    times: str

    @classmethod
    def load(cls, folder: Path) -> "Source":
        try:
            return cls(**read_json(folder / "source.json"))
        except (FileNotFoundError, ValueError, TypeError):
            raise UserError(f"{folder / 'source.json'} is missing or damaged; run the fetch stage again") from None
