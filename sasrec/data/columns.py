"""Which columns of the user's own file hold what."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sasrec.config import Columns
from sasrec.data.explain import open_text
from sasrec.errors import UserError

SEPARATORS = (",", "\t", ";", "|")
WORDS = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}


@dataclass(frozen=True)
class Found:
    """Position of each column among those of the file; None: not there, or not wanted."""

    user: int
    item: int
    timestamp: int | None = None
    rating: int | None = None
    category: int | None = None

    def present(self) -> list[tuple[str, int]]:
        """(what, position) of the columns that are there."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None]


def find(columns: Columns, names: list[str], path: Path, own: bool = True) -> Found:
    """Look the wanted columns up among `names`. Raises UserError that lists the names of the file.

    `own`: whether the names are the user's, from dataset.columns, or belong to a known format.
    """
    uses: dict[str | None, str] = {}
    for what, name in asdict(columns).items():
        if name is not None and name in uses:
            advice = "name another column" if what == "item" else "name another column, or set the latter to null"
            raise UserError(f"params.yaml: dataset.columns.{uses[name]} and dataset.columns.{what} are both '{name}'; {advice}")
        uses[name] = what
    stripped = [name.strip() for name in names]
    defaults = Columns()
    places: dict[str, int | None] = {}
    for field in fields(Columns):
        what, wanted = field.name, getattr(columns, field.name)
        found = stripped.count(wanted)
        if found > 1:
            raise UserError(f"{path}: the column '{wanted}' is there {found} times; rename one of them")
        optional = what not in ("user", "item") and wanted == getattr(defaults, what)
        if not found and wanted is not None and not optional:
            listed = ", ".join(f"'{name}'" for name in stripped[:30])
            advice = "This is not the format of the data set; set dataset.name to file and dataset.columns to the names"
            if own:
                advice = (
                    f"Set dataset.columns.{what} to one of them, or dataset.separator if these are not single columns "
                    f"(a file without a header needs one)"
                )
            raise UserError(f"{path}: no column '{wanted}' in the header; found {listed}. {advice}")
        places[what] = stripped.index(wanted) if found else None
    return Found(**places)  # type: ignore[arg-type]


def header(path: Path, columns: Columns, separator: str | None) -> tuple[str, list[str]]:
    """Separator and column names of a delimited file; the separator is found from the ending and the header if None."""
    with open_text(path) as file:
        line = file.readline(1 << 20)
        filled = bool(line.strip()) or any(other.strip() for other in file)
    if "\0" in line or any("\udc80" <= letter <= "\udcff" for letter in line):
        raise UserError(f"{path}, line 1: not UTF-8 text; save the file as UTF-8")
    if not filled:
        raise UserError(f"{path} is empty: it has no header line; give a file whose first line names the columns")
    if not line.strip():
        raise UserError(f"{path}, line 1: blank; it has to name the columns; remove the blank lines before the header")

    def split(by: str) -> list[str]:
        return next(csv.reader([line.rstrip("\r\n")], delimiter=by))

    if separator is not None:
        separator = WORDS.get(separator, separator)
        if len(separator) != 1 or separator in '\r\n"':
            raise UserError(
                f"params.yaml: dataset.separator must be one character, not '{separator}'; for `::` set dataset.format "
                f"to movielens-dat"
            )
        return separator, split(separator)
    name = path.name.lower().removesuffix(".gz")
    likely = ("\t", *SEPARATORS) if name.endswith(".tsv") else SEPARATORS
    for by in likely:
        if {columns.user, columns.item} <= {part.strip() for part in split(by)}:
            return by, split(by)
    by = max(likely, key=line.count)
    return by, split(by)
