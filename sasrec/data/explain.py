"""The second, slow pass over a text file that could not be read: which line is the first bad one, and why."""

import csv
import gzip
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sasrec.data.timestamps import DATE, is_time
from sasrec.errors import UserError

SHOWN = 80  # characters of a bad line that are quoted

LONGEST = 1 << 24  # characters of a field: more than pyarrow reads, so that nothing it reads is refused here
SWALLOWED = (
    "a quote at the start of a field is closed only lines later, with whole rows between; close it, write it twice, or set "
    "dataset.quotes to false if quotes are letters like any other here"
)
UNESCAPED = (
    "text follows the quote that closes a field; write each quote within a field twice, and the field in quotes, or set "
    "dataset.quotes to false if quotes are letters like any other here"
)
NO_NUMBER = "the {what} is not a number"
DECIMAL_COMMA = "the {what} has a comma in place of a point; write 3.5 for 3,5"
MISSING = "the {what} is missing"
NO_RATING = f"{NO_NUMBER}; if this column is none of numbers, set dataset.columns.rating to null"
NO_NEED = "if ratings are not needed, set dataset.columns.rating to null"
NOT_UTF8 = "not UTF-8 text (save the file as UTF-8)"
LARGEST = 3.4028235e38  # of a float32, as which ratings are stored
TOO_LARGE = "the {what} is too large, beyond 3.4e38"


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open plain or gzipped text; the byte-order mark is skipped, bytes that are not UTF-8 become surrogates."""
    opened: Callable[..., IO[str]] = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield file


def quote(text: str) -> str:
    """The beginning of a line, safe to print."""
    text = text.encode("utf-8", "backslashreplace").decode().rstrip("\r\n")
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def bad_line(path: Path, number: int, problem: str, content: str) -> UserError:
    return UserError(f"{path}, line {number}: {problem}: {quote(content)}; correct or remove the line and run again")


def rows(path: Path, separator: str, quoted: bool) -> Iterator[tuple[int, list[str], str]]:
    """Line number (from 1), fields, and the line, for every line that is not blank."""
    with open_text(path) as file:
        if quoted:
            csv.field_size_limit(LONGEST)
            reader = csv.reader(file, delimiter=separator)
            start = 1
            try:
                for fields in reader:
                    if fields:
                        yield start, fields, separator.join(fields)
                    start = reader.line_num + 1
            except csv.Error as error:
                raise csv.Error(f"from line {start}: {error}") from None
        else:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\r\n")
                if line:
                    yield number, line.split(separator), line


def id_problem(value: str) -> str | None:
    if not value:
        return "the {what} id is empty"
    return NOT_UTF8 if any("\udc80" <= letter <= "\udcff" for letter in value) else None


def number_problem(value: str) -> str | None:
    try:
        if "_" in value:
            raise ValueError
        return None if math.isfinite(float(value)) else "the {what} is not a finite number"
    except ValueError:
        if re.fullmatch(r"\s*[+-]?\d*,\d+\s*", value):
            return DECIMAL_COMMA
        return MISSING if not value.strip() else NO_NUMBER


def rating_problem(value: str) -> str | None:
    problem = number_problem(value) or (TOO_LARGE if abs(float(value)) > LARGEST else None)
    return {NO_NUMBER: NO_RATING, MISSING: f"{MISSING}; {NO_NEED}"}.get(problem or "", problem)


def time_problem(value: str) -> str | None:
    if is_time(value):
        return None
    problem = number_problem(value) or "the {what} is too large, beyond 9.2e18"
    return (
        problem if problem != NO_NUMBER else "the {what} is neither a number nor a date like 2010-04-18 or 2010-04-18T15:41:48Z"
    )


def time_kind(value: str) -> str:
    """Of a time, as text: those of one column must be of one kind."""
    date = DATE.fullmatch(value)
    return "a number" if date is None else "a date with a zone" if date[4] else "a date without a zone"


PROBLEMS: dict[str, Callable[[str], str | None]] = {
    "user": id_problem,
    "item": id_problem,
    "timestamp": time_problem,
    "rating": rating_problem,
}


def swallows(fields: Sequence[str], separator: str, columns: Sequence[tuple[str, int]]) -> bool:
    """Whether a quoted field holds line ends and every line of it, with its neighbours, is a whole row that could be read:
    then the quote that it begins with was meant as a letter."""
    for position, field in enumerate(fields):
        after = fields[position + 1 :]
        if "\n" in field or "\r" in field:
            first, *others = re.split(r"[\r\n]+", field if after else field.rstrip("\r\n"))
            if not others:
                return False
            others[-1] = separator.join([others[-1], *after])
            lines = ([*fields[:position], *first.split(separator)], *(line.split(separator) for line in others))
            return all(len(line) == len(fields) and _readable(line, columns) for line in lines)
    return False


def _readable(values: Sequence[str], columns: Sequence[tuple[str, int]]) -> bool:
    """Whether these are values of a row. In prose a space follows a comma, so ids are not to begin with one."""
    return all(PROBLEMS[what](values[at]) is None and not values[at].startswith(" ") for what, at in columns)


def find_swallowed(path: Path, separator: str, columns: Sequence[tuple[str, int]]) -> UserError | None:
    """The error for the first row with others in a quoted field, or None."""
    for number, values, line in rows(path, separator, True):
        if swallows(values, separator, columns):
            return bad_line(path, number, SWALLOWED, line)
    return None


def find_unescaped(path: Path, separator: str) -> UserError | None:
    """The error for the first line in which a field goes on after its closing quote, or None. Without it `"A" side` would be
    read as `A side`."""
    csv.field_size_limit(LONGEST)
    last = ""

    def lines(file: IO[str]) -> Iterator[str]:
        nonlocal last
        for line in file:
            last = line
            yield line

    with open_text(path) as file:
        reader = csv.reader(lines(file), delimiter=separator, strict=True)
        try:
            for _ in reader:
                pass
        except csv.Error as error:
            if "expected after" in str(error):
                return bad_line(path, reader.line_num, UNESCAPED, last)
    return None


def explain(
    path: Path, separator: str, quoted: bool, header: bool, fields: int, columns: Sequence[tuple[str, int]], reason: str
) -> UserError:
    """The error for a delimited file that could not be read.

    `fields`: how many a line must have. `columns`: (user, item, timestamp or rating; its position) to check.
    `reason`: what the fast reader said, given when no line is found at fault.
    """
    count = 0
    kind: str | None = None
    shown = {"\t": "tabs"}.get(separator, f"separators '{separator}'")
    try:
        for number, values, line in rows(path, separator, quoted):
            if header:
                header = False
                continue
            count += 1
            if quoted and swallows(values, separator, columns):
                return bad_line(path, number, SWALLOWED, line)
            if len(values) != fields:
                other = " (if the file is of another kind, name it in dataset.format)" if count == 1 else ""
                return bad_line(path, number, f"expected {fields} fields between {shown}, found {len(values)}{other}", line)
            for what, position in columns:
                problem = PROBLEMS[what](values[position])
                if what == "timestamp" and problem is None:
                    kind = kind or time_kind(values[position])
                    if (own := time_kind(values[position])) != kind:
                        problem = f"the {{what}} is {own}, unlike those before"
                if problem:
                    return bad_line(path, number, problem.format(what=what), line)
            if id_problem(line.replace(separator, "")) == NOT_UTF8:
                return bad_line(path, number, NOT_UTF8, line)
    except csv.Error as error:
        return UserError(f"{path}: not a readable csv file: {error}; check dataset.separator")
    except (EOFError, gzip.BadGzipFile):
        return UserError(f"{path} is not a whole gzip file; get it again")
    if not count:
        return UserError(f"{path} is empty: it has no interactions; give a file with at least one line of data")
    return UserError(f"{path} cannot be read: {' '.join(reason.split())[:300]}")
