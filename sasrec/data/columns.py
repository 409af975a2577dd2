"""Which columns of the user's own file hold what."""

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sasrec.config import Columns
from sasrec.data.explain import open_text, quote
from sasrec.data.timestamps import DATE
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


def find(columns: Columns, names: list[str], path: Path, own: bool = True, text: bool = False) -> Found:
    """Look the wanted columns up among `names`. Raises UserError that lists the names of the file.

    `own`: whether the names are the user's, from dataset.columns, or belong to a known format. `text`: whether they are the
    first line of a text file, which may have none.
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
        missing = not found and wanted is not None and not optional
        taken = found and what == "timestamp" and _is_moment(wanted)
        if text and own and (taken or (missing and _are_values(stripped))):
            raise UserError(
                f"{path}, line 1: {quote(', '.join(stripped))} are values, not names of columns; put a line of names above it, "
                "such as user,item,timestamp, with a name for each column"
            )
        listed = ", ".join(f"'{name}'" for name in stripped[:30])
        if missing:
            advice = (
                "This is not the format of the data set; set dataset.name to file, dataset.format to table (or jsonl), and "
                "dataset.columns to the names"
            )
            if own:
                advice = f"Set dataset.columns.{what} to one of them"
                advice += ", or dataset.separator if these are not single columns" if text else ""
            raise UserError(f"{path}: no column '{wanted}'; found {listed}. {advice}")
        # Without it the order of the rows would count, and nothing would stop.
        if what == "timestamp" and own and not found and wanted is not None and wanted in map(str.casefold, stripped):
            raise UserError(
                f"{path}: no column '{wanted}', but one that differs in capital letters; found {listed}. Set "
                "dataset.columns.timestamp to it, or to null if the order of the rows counts"
            )
        places[what] = stripped.index(wanted) if found else None
    return Found(**places)  # type: ignore[arg-type]


def _are_values(names: list[str]) -> bool:
    """Whether the first line of a file has values: at least half are numbers or dates, and one of them is a time; or all are
    numbers, other than the places of the columns, which some programs take for names."""
    numbers = [_number(name) for name in names]
    filled = [DATE.fullmatch(name) is not None or number is not None for name, number in zip(names, numbers, strict=True)]
    if any(map(_is_moment, names)) and 2 * sum(filled) >= len(names):
        return True
    return None not in numbers and numbers != list(range(len(names)))


def _is_moment(name: str) -> bool:
    """Whether it is a date, or a number as large as times since 1970 are."""
    number = _number(name)
    return DATE.fullmatch(name) is not None or (number is not None and number >= 10**8)


def _number(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def header(path: Path, columns: Columns, separator: str | None, quotes: bool = True) -> tuple[str, list[str]]:
    """Separator and column names of a delimited file; the separator is found from the ending and the header if None. quotes:
    whether a name may stand in quotes, which are no part of it."""
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
        text = line.rstrip("\r\n")
        return next(csv.reader([text], delimiter=by)) if quotes else text.split(by)

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
