"""Categories of items from the column of the user's own file: one name, several with a separator between, or a list.

A list is what JSON, Python, numpy or PostgreSQL write for one: ["A", "B"], ['A', 'B'], ['A' 'B'], [A, B], {A,B}; lists in
lists, such as Amazon's paths, count as one list. A name may hold any character in a list, and is not split further.

Text outside a list is split where `dataset.category_separator` says, or, where that is empty, at what the column itself shows:
`|`, else `>`, wherever they occur; else `;` or `,` if most of the parts that they separate occur in more than one combination.
So `Action,Drama` beside `Drama,Comedy` is two categories; `Clothing, Shoes & Jewelry` and `Toys &amp; Games` are one each.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sasrec.data.columns import WORDS
from sasrec.data.spool import CHUNK
from sasrec.data.table import Numbers

Categories = dict[str, tuple[str, ...]]

# How programs write that there is none, besides nothing at all; the last is MovieLens's.
MISSING = frozenset(("", "nan", "NaN", "None", "null", "NULL", "<NA>", "\\N", "(no genres listed)"))

SURE, LIKELY = ("|", ">"), (";", ",")

TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<mark>[\[\]{},])|(?P<bare>[^\s'"\[\]{},][^\[\]{},]*))"""
)


class BadCategory(ValueError):
    """A cell that cannot be read; `cell` as it stands in the file, `row` the first with it, from 0."""

    def __init__(self, problem: str, cell: str, row: int) -> None:
        super().__init__(problem)
        self.problem, self.cell, self.row = problem, cell, row


def per_item(
    items: Numbers, item_ids: Sequence[str], codes: Numbers, cells: Sequence[str], separator: str | None = None
) -> tuple[Categories, str]:
    """Categories of each item: those of its first row that has any; and a note on what was taken for granted, or "".

    items, codes: int32 (rows,), the places of each row's item and cell in `item_ids` and `cells`. Raises BadCategory.
    """
    names, how = parsed(codes, cells, separator)
    filled = np.array([bool(own) for own in names], bool)
    category = np.full(len(item_ids), -1, np.int64)
    others = np.zeros(len(item_ids), bool)
    for begin in range(0, len(codes), CHUNK):
        item, own = items[begin : begin + CHUNK], codes[begin : begin + CHUNK]
        item, own = item[filled[own]], own[filled[own]]
        new = category[item] < 0
        category[item[new][::-1]] = own[new][::-1]  # of repeated indices the last one stays
        others[item[own != category[item]]] = True
    differ = int(others.sum())
    notes = [how] if how else []
    if differ:
        notes.append(f"{differ} of {len(item_ids)} items have other categories in other rows; those of the first row count")
    return {item_ids[i]: names[code] for i, code in enumerate(category.tolist()) if code >= 0}, "; ".join(notes)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as strings without nulls; lists as JSON."""
    if pa.types.is_nested(column.type):
        chunks = [
            [json.dumps(row, ensure_ascii=False, default=str) if row else "" for row in c.to_pylist()] for c in column.chunks
        ]
        return pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string())
    return column.cast(pa.string()).fill_null("")


def parsed(codes: Numbers, cells: Sequence[str], separator: str | None) -> tuple[list[tuple[str, ...]], str]:
    """The names in each distinct cell, and a note where a separator was recognised that is not always one."""
    lists: dict[int, list[str]] = {}
    for i, cell in enumerate(cells):
        try:
            if (own := elements(cell.strip())) is not None:
                lists[i] = own
        except ValueError as error:
            raise BadCategory(str(error), cell, first_row(codes, i)) from None
    plain = [cell for i, cell in enumerate(cells) if i not in lists and cell not in MISSING]
    by = recognised(plain) if separator is None else "" if separator == "none" else WORDS.get(separator, separator)
    names = [named(lists[i] if i in lists else cell.split(by) if by else [cell]) for i, cell in enumerate(cells)]
    if separator is None and by not in ("", "|"):
        return names, f"categories are split at '{by}'; if that is part of their names, set dataset.category_separator to none"
    return names, ""


def first_row(codes: Numbers, code: int) -> int:
    """The first row with that code, which some row has."""
    for begin in range(0, len(codes), CHUNK):
        if (same := codes[begin : begin + CHUNK] == code).any():
            return begin + int(np.argmax(same))
    raise ValueError(f"no row has the code {code}")


def named(parts: Sequence[str]) -> tuple[str, ...]:
    """Each name once, in the order of the cell, without what stands for none."""
    return tuple(dict.fromkeys(name for part in parts if (name := part.strip()) not in MISSING))


def recognised(cells: Sequence[str]) -> str:
    """What separates the categories of these distinct cells; "" for nothing."""
    for by in SURE:
        if any(by in cell for cell in cells):
            return by
    for by in LIKELY:
        # How many of the cells name a part.
        uses = Counter(name for cell in cells for name in named(cell.split(by)))
        parts = {name for cell in cells if by in cell for name in named(cell.split(by))}
        if parts and 2 * sum(uses[name] > 1 for name in parts) > len(parts):
            return by
    return ""


def elements(cell: str) -> list[str] | None:
    """The elements of a list, flattened; None for a cell that is none. Raises ValueError for a list that cannot be read."""
    if cell[:2] in ("['", '["', "[[") and not cell.endswith("]"):
        raise ValueError("the category is a list without an end")
    if not (cell[:1] + cell[-1:] in ("[]", "{}") and len(cell) > 1):
        return None
    try:
        return list(flat(json.loads(cell)))
    except json.JSONDecodeError:
        return list(tokens(cell))


def flat(value: Any) -> Iterator[str]:
    """The names in a value of JSON, as text."""
    if isinstance(value, dict):
        raise ValueError('the category is an object, not a name; write names, such as ["A", "B"]')
    if isinstance(value, list):
        for element in value:
            yield from flat(element)
    elif value is not None:
        yield str(value)


def tokens(cell: str) -> Iterator[str]:
    """The names in a list that is not JSON."""
    place, after_name = 0, False
    while place < len(cell):
        found = TOKEN.match(cell, place)
        if found is None or (after_name and found["bare"]):
            raise ValueError('the category is neither a list of names, such as ["A", "B"], nor a single one')
        if found["quoted"]:
            yield ast.literal_eval(found["quoted"])
        elif found["bare"]:
            yield found["bare"]
        place, after_name = found.end(), bool(found["quoted"])
