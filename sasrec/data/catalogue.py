"""The data sets that `dataset.name` can name, and the formats that `dataset.format` can name."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from sasrec.config import Columns, DatasetParams
from sasrec.errors import UserError
from sasrec.mapping import unknown

Times = Literal["comparable", "order"]


@dataclass(frozen=True)
class Format:
    """`main`: usual names of the file of interactions; inside an archive it is found by them.
    `extras`: names of files with titles and categories, taken along from an archive that has them."""

    main: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "movielens-dat": Format(("ratings.dat",), ("movies.dat",)),
    "movielens-tab": Format(("u.data",), ("u.item", "u.genre")),
    "movielens-csv": Format(("ratings.csv",), ("movies.csv",)),
    "amazon-2014": Format(),  # csv without header: user, item, rating, timestamp
    "amazon-2018": Format(),  # csv without header: item, user, rating, timestamp
    "amazon-2023-csv": Format(),  # csv with header: user_id, parent_asin, rating, timestamp
    "amazon-2023-jsonl": Format(),
    "user-item": Format(),  # lines `user item`, chronological
    "sequences": Format(),  # lines `user item item ...`, chronological
    "table": Format(),  # the user's own csv or tsv, columns by name
    "parquet": Format(),
    "jsonl": Format(),
}

# Formats of the user's own files, by the ending of the name (without .gz).
ENDINGS = {
    ".csv": "table",
    ".tsv": "table",
    ".txt": "table",
    ".dat": "movielens-dat",
    ".data": "movielens-tab",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


@dataclass(frozen=True)
class Dataset:
    """One data set. `url` None: a local file is needed. `sha256` None: it could not be known when this was written.
    `times`: whether timestamps of different users can be compared, or only order each user's own events."""

    url: str | None
    sha256: str | None
    format: str | None
    member: str | None  # path of the file of interactions inside the archive
    times: Times


_GROUPLENS = "https://files.grouplens.org/datasets/movielens"

DATASETS: dict[str, Dataset] = {
    "sample": Dataset(None, None, "movielens-dat", None, "comparable"),
    "ml-1m": Dataset(
        f"{_GROUPLENS}/ml-1m.zip",
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        "movielens-dat",
        "ml-1m/ratings.dat",
        "comparable",
    ),
    "ml-100k": Dataset(
        f"{_GROUPLENS}/ml-100k.zip",
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        "movielens-tab",
        "ml-100k/u.data",
        "comparable",
    ),
    "amazon-video-games-2023": Dataset(
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/review_categories/Video_Games.jsonl.gz",
        None,
        "amazon-2023-jsonl",
        None,
        "comparable",
    ),
    "amazon-beauty-2014": Dataset(
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Beauty.csv",
        None,
        "amazon-2014",
        None,
        "comparable",
    ),
    "sasrec": Dataset(None, None, "user-item", None, "order"),
    "s3rec": Dataset(None, None, "sequences", None, "order"),
    "file": Dataset(None, None, None, None, "comparable"),
}


def dataset(name: str) -> Dataset:
    """The entry `name`. Raises UserError with the nearest name."""
    if name not in DATASETS:
        raise unknown("data set in dataset.name", name, DATASETS)
    return DATASETS[name]


def ending(file: str) -> str:
    """The ending that tells the format: of `a.csv.gz` it is `.csv`; lower case."""
    path = PurePath(file.lower())
    return PurePath(path.stem).suffix if path.suffix == ".gz" else path.suffix


def format_of(params: DatasetParams, file: str) -> str:
    """The format of the file named `file`: `dataset.format` if set, else the data set's own, else by its name."""
    if params.format is not None:
        if params.format not in FORMATS:
            raise unknown("format in dataset.format", params.format, FORMATS)
        return params.format
    by_name = [name for name, known in FORMATS.items() if PurePath(file).name in known.main]
    own = dataset(params.name).format
    if own == "amazon-2023-jsonl" and ending(file) == ".csv":
        return "amazon-2023-csv"
    if own is not None and own.startswith("movielens") and by_name:
        return by_name[0]
    if own is not None:
        return own
    # Who names columns has a file of columns, whatever it is called: `ratings.csv` is a usual name.
    if by_name and (params.columns == Columns() or by_name[0] != "movielens-csv"):
        return by_name[0]
    if ending(file) in ENDINGS:
        return ENDINGS[ending(file)]
    raise UserError(f"{file}: the format cannot be told from the name; set dataset.format to one of {', '.join(FORMATS)}")
