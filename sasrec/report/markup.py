"""Pieces of HTML that the parts of the page share."""

import re
from collections.abc import Sequence
from html import escape


def text(plain: str) -> str:
    """Escaped, with numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=%|kB|MB|GB|B\b|bit)", "&nbsp;", escape(plain))


def row(cells: Sequence[str]) -> str:
    """A row of plain text, whose first cell is its head."""
    first, *others = map(escape, cells)
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"


def table(label: str, caption: str, header: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls inside its own box. header: plain text; rows: HTML of whole <tr>."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n<table>\n'
        f"<caption><span>{text(caption)}</span></caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n"
        + "\n".join(rows) + "\n</tbody>\n</table>\n</div>"
    )  # fmt: skip
