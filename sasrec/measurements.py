"""Tables of what was measured on some machine, kept as CSV files that a later measurement adds to."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sasrec.errors import UserError
from sasrec.files import write_text


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows measured so far; none where there is no file. Raises UserError where it has other columns than those."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if columns is not None and set(reader.fieldnames or ()) != set(columns):
        raise UserError(f"{path} has other columns than this command writes; delete it and measure again")
    return rows


def shown_rows(path: Path, command: str, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a table that a document names. Raises UserError where there is none; command: what makes it."""
    if not path.exists():
        raise UserError(f"a table names {path}, which does not exist; python -m {command} makes it")
    return read_rows(path, columns)


def replace_rows(
    path: Path,
    found: Iterable[Mapping[str, str]],
    keys: Sequence[str],
    columns: Sequence[str],
    order: Callable[[Mapping[str, str]], Any] | None = None,
) -> None:
    """Write the table with what was found in place of the rows that agree with it in the columns `keys`, and new ones behind.

    order: what the rows are sorted by; None: as they came. Raises UserError where the table has other columns.
    """
    rows: dict[tuple[str, ...], Mapping[str, str]] = {}
    for row in [*read_rows(path, columns), *found]:
        rows[tuple(row[key] for key in keys)] = row
    ordered = list(rows.values()) if order is None else sorted(rows.values(), key=order)
    write_text(path, as_csv(ordered, columns))


def as_csv(rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> str:
    """A column that a row lacks is empty in it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
