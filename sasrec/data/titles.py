"""Titles and categories of the MovieLens sets: movies.dat, u.item with u.genre, movies.csv."""

import csv
from collections.abc import Iterator
from pathlib import Path

from sasrec.data.explain import bad_line
from sasrec.errors import UserError

Items = tuple[dict[str, str], dict[str, tuple[str, ...]]]
NONE = "(no genres listed)"


def read(folder: Path, extras: list[str]) -> Items:
    """Titles and categories by item id from the files `extras` in `folder`; empty where there are none."""
    if "movies.dat" in extras:
        parse = _movies_dat
    elif "u.item" in extras:
        parse = _u_item
    elif "movies.csv" in extras:
        parse = _movies_csv
    else:
        return {}, {}
    titles: dict[str, str] = {}
    categories: dict[str, tuple[str, ...]] = {}
    for item, title, genres in parse(folder):
        titles[item] = title
        categories[item] = tuple(genre for genre in genres if genre and genre != NONE)
    return titles, categories


def _lines(path: Path) -> list[str]:
    """The older sets are Latin-1, the newer UTF-8; no Latin-1 title happens to be valid UTF-8."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # Not splitlines: it also splits at control characters that Latin-1 text may hold.
    return [line.rstrip("\r") for line in text.split("\n")]


def _movies_dat(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    path = folder / "movies.dat"
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        item, _, rest = line.partition("::")
        title, separator, genres = rest.rpartition("::")
        if not separator:
            raise bad_line(path, number, "expected item::title::genres", line)
        yield item, title, genres.split("|")


def _u_item(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    path, genre_path = folder / "u.item", folder / "u.genre"
    names: list[str] = []
    if genre_path.exists():
        names = [line.rpartition("|")[0] for line in _lines(genre_path) if "|" in line]
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        fields = line.split("|")
        flags = fields[5:]
        if len(fields) < 5 or (names and len(flags) != len(names)):
            raise bad_line(path, number, f"expected {5 + len(names)} fields separated by '|'", line)
        yield fields[0], fields[1], [name for name, flag in zip(names, flags, strict=False) if flag == "1"]


def _movies_csv(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    path = folder / "movies.csv"
    reader = csv.reader(_lines(path))
    header = next(reader, [])
    if header[:3] != ["movieId", "title", "genres"]:
        raise UserError(f"{path}: the header must be movieId,title,genres; found {','.join(header)[:80]}")
    for fields in reader:
        if not fields:
            continue
        if len(fields) != 3:
            raise bad_line(path, reader.line_num, "expected 3 fields", ",".join(fields))
        yield fields[0], fields[1], fields[2].split("|")
