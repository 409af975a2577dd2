"""One function per format, from the raw folder to the common table."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from sasrec.config import Columns, DatasetParams
from sasrec.data import delimited, sequence_lines, titles
from sasrec.data.columnar import amazon_2023, read_jsonl, read_parquet
from sasrec.data.columns import Found, find, header
from sasrec.data.delimited import Layout
from sasrec.data.explain import open_text, quote
from sasrec.data.source import Source
from sasrec.data.table import Table
from sasrec.errors import UserError

RATINGS = Found(user=0, item=1, rating=2, timestamp=3)
# Users begin with A and are longer than items, which are numbers of books or begin with B.
AMAZON_USER, AMAZON_ITEM = re.compile(r"A[0-9A-Z]{10,}"), re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")


def read(folder: Path, source: Source, params: DatasetParams, scratch: Path | None = None) -> Table:
    """Read the raw folder. scratch: where temporary files go, by default where the system keeps them. Raises UserError naming
    file, line or column for anything that does not fit the format."""
    path = folder / source.file
    if not path.exists():
        raise UserError(f"{path} is missing; run the fetch stage again")
    try:
        table = READERS[source.format](path, params, scratch)
    except UserError as error:
        # What is mended in the copy is undone by DVC, which takes it from its cache again.
        copied = source.local and str(error).startswith(str(path))
        raise UserError(f"{error} ({path} is a copy: mend {source.original} itself)") if copied else error from None
    names, categories = titles.read(folder, source.extras)
    return dataclasses.replace(table, titles=names, categories=categories or table.categories)


def movielens_dat(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """`user::item::rating::timestamp`, as in MovieLens 1M and 10M."""
    return delimited.read(path, Layout("::", 4, RATINGS), scratch)


def movielens_tab(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """user, item, rating, timestamp between tabs, as in MovieLens 100K."""
    return delimited.read(path, Layout("\t", 4, RATINGS), scratch)


def movielens_csv(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """userId,movieId,rating,timestamp with that header, as in the newer MovieLens sets."""
    return _named(path, params, Columns("userId", "movieId", "timestamp", "rating", None), ",", scratch, own=False)


def amazon_2014(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """user,item,rating,timestamp without a header."""
    return _amazon(path, RATINGS, "amazon-2018", scratch)


def amazon_2018(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """item,user,rating,timestamp without a header."""
    return _amazon(path, dataclasses.replace(RATINGS, user=1, item=0), "amazon-2014", scratch)


def _amazon(path: Path, columns: Found, turned: str, scratch: Path | None) -> Table:
    """turned: the format in which users and items change places."""
    with open_text(path) as file:
        fields = file.readline(1 << 20).split(",")
    if len(fields) == 4 and AMAZON_USER.fullmatch(fields[columns.item]) and AMAZON_ITEM.fullmatch(fields[columns.user]):
        raise UserError(
            f"the format does not suit {path}: in line 1, {quote(','.join(fields))} has an item where users are; set "
            f"dataset.name to file and dataset.format to {turned}"
        )
    return delimited.read(path, Layout(",", 4, columns), scratch)


def amazon_2023_csv(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """user_id,parent_asin,rating,timestamp with that header, timestamps in milliseconds."""
    return _named(path, params, amazon_2023(params.columns), ",", scratch, own=False)


def amazon_2023_jsonl(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """One review per line as a JSON object."""
    return read_jsonl(path, amazon_2023(params.columns), own=False, folder=scratch)


def user_item(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """Two words per line, chronological."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
    separator = "\t" if "\t" in first else "," if "," in first and " " not in first.strip() else " "
    return delimited.read(path, Layout(separator, 2, Found(user=0, item=1)), scratch)


def sequences(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """`user item item ...`, one line per user."""
    return sequence_lines.read(path)


def table(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """The user's own csv or tsv with a header."""
    return _named(path, params, params.columns, params.separator, scratch)


def parquet(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """The user's own parquet."""
    return read_parquet(path, params.columns, scratch, params.category_separator)


def jsonl(path: Path, params: DatasetParams, scratch: Path | None) -> Table:
    """The user's own JSON lines."""
    return read_jsonl(path, params.columns, folder=scratch, category_separator=params.category_separator)


def _named(
    path: Path, params: DatasetParams, columns: Columns, separator: str | None, scratch: Path | None, own: bool = True
) -> Table:
    """own: whether names and separator are the user's, not those of a known format."""
    by, names = header(path, columns, separator, params.quotes)
    found = find(columns, names, path, own, text=True)
    layout = Layout(by, len(names), found, True, params.quotes, params.category_separator if own else None)
    return delimited.read(path, layout, scratch)


READERS: dict[str, Callable[[Path, DatasetParams, Path | None], Table]] = {
    "movielens-dat": movielens_dat,
    "movielens-tab": movielens_tab,
    "movielens-csv": movielens_csv,
    "amazon-2014": amazon_2014,
    "amazon-2018": amazon_2018,
    "amazon-2023-csv": amazon_2023_csv,
    "amazon-2023-jsonl": amazon_2023_jsonl,
    "user-item": user_item,
    "sequences": sequences,
    "table": table,
    "parquet": parquet,
    "jsonl": jsonl,
}
