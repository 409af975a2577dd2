"""Files with one line per user: `user item item ...`, chronological, separated by white space."""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from sasrec.data.explain import bad_line
from sasrec.data.table import Table, encode
from sasrec.errors import UserError

SPACE = np.isin(np.arange(256, dtype=np.uint8), np.frombuffer(b" \t\r\n\v\f", np.uint8))


def read(path: Path) -> Table:
    """Read the whole file. Raises UserError for a line with a user but no items, for bytes that are not UTF-8, and for
    an empty file. A user with several lines has them one after the other."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        text = file.read().removeprefix(b"\xef\xbb\xbf")
    letters = np.frombuffer(text, np.uint8)
    space = SPACE[letters]
    # A word starts at a letter whose neighbour on the left is white space; its line is the number of line ends before.
    starts = np.flatnonzero(~space & np.concatenate([[True], space[:-1]])) if len(letters) else np.zeros(0, np.int64)
    if not len(starts):
        raise UserError(f"{path} is empty: it has no interactions; give a file with at least one line of data")
    line_ends = np.flatnonzero(letters == ord("\n"))
    line = np.searchsorted(line_ends, starts)
    first = np.concatenate([[True], line[1:] != line[:-1]])
    words_in_line = np.diff(np.append(np.flatnonzero(first), len(starts)))
    if (words_in_line == 1).any():
        number = int(line[first][np.argmax(words_in_line == 1)]) + 1
        raise bad_line(path, number, "expected a user and at least one item, found one word", _line(text, number))
    words = pa.array(text.split(), pa.binary())
    try:
        words = words.cast(pa.string())
    except pa.ArrowInvalid:
        number = next(i for i, part in enumerate(text.split(b"\n"), 1) if not _is_utf8(part))
        raise bad_line(path, number, "not UTF-8 text", _line(text, number)) from None
    users, user_ids = encode(pa.chunked_array([words.filter(pa.array(first))]))
    items, item_ids = encode(pa.chunked_array([words.filter(pa.array(~first))]))
    return Table(np.repeat(users, words_in_line - 1), user_ids, items, item_ids)


def _line(text: bytes, number: int) -> str:
    return re.split(rb"\n", text)[number - 1].decode("utf-8", "surrogateescape")


def _is_utf8(part: bytes) -> bool:
    try:
        part.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
