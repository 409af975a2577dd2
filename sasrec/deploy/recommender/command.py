"""The command line: ids in, a table or JSON out."""

import argparse
import json
import re
import sys
from collections.abc import Sequence

from .answers import Recommendation
from .manifest import ArtefactError
from .model import Recommender

# One id: in double quotes, or up to the next comma.
LISTED = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^\s",][^,]*)?)\s*(?:,|\Z)')


def listed(option: str, text: str) -> list[str]:
    """The ids that an option names, as a line of CSV. Spaces around an id do not count, those within its quotes do.

    Not csv.reader: that does not tell which spaces were in quotes. Raises ValueError where quotes do not fit."""
    ids, at = [], 0
    while at < len(text):
        found = LISTED.match(text, at)
        if found is None:
            raise ValueError(
                f"--{option}: the double quotes at {text[at:].strip()[:30]} do not end at a comma; an id with a comma is "
                'written "a,b", and one that begins with a double quote """a"'
            )
        quoted, plain = found.groups()
        if quoted is not None:
            ids.append(quoted.replace('""', '"'))
        elif plain:
            ids.append(plain.strip())
        at = found.end()
    return ids


def table(result: Recommendation) -> str:
    """A recommendation as lines for a terminal."""
    wide = max([len("item"), *(len(item.id) for item in result.items)])
    lines = [f"{'':>4}  {'item':<{wide}}  {'score':>9}  title"]
    for place, item in enumerate(result.items, 1):
        title = item.title + (f" ({', '.join(item.categories)})" if item.categories else "")
        lines.append(f"{place:>4}  {item.id:<{wide}}  {item.score:>9.4f}  {title}".rstrip())
    unknown = {"the history": result.unknown, "--allow": result.unknown_allow, "--block": result.unknown_block}
    lines += [f"ignored {count} of {where} that the model does not know" for where, count in unknown.items() if count]
    if result.nothing_allowed:
        lines.append("no known item in --allow: nothing can be recommended")
    elif result.by_popularity:
        lines.append("no known item in the history: these are the most popular; the score counts interactions")
    return "\n".join(lines)


def main(arguments: Sequence[str], prog: str, folder: str | None = None) -> int:
    """The command line. folder: the model where --model is not given; None: it must be."""
    commas = """separated by commas; one with a comma or outer spaces in double quotes: '"a,b",c'"""
    parser = argparse.ArgumentParser(prog=prog, description="Recommend items after a history.")
    parser.add_argument("--model", default=folder, required=folder is None, help="folder of an exported model")
    parser.add_argument("--history", default="", help=f"original item ids, oldest first, {commas}")
    parser.add_argument("--ratings", help="of the history's items, separated by commas, nothing where unknown: 5,,3")
    parser.add_argument("--times", help="of the history's events, in seconds since 1970, separated by commas")
    parser.add_argument("-k", type=int, default=10, help="how many to recommend")
    parser.add_argument("--include-seen", action="store_true", help="recommend items of the history, too")
    parser.add_argument("--allow", help=f"recommend from these ids only, {commas}")
    parser.add_argument("--block", help=f"never recommend these ids, {commas}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)

    def ids(option: str, text: str | None) -> list[str] | None:
        return None if text is None else listed(option, text)

    def values(name: str, text: str | None) -> list[float | None] | None:
        if not text:
            return None
        try:
            return [float(part) if part.strip() else None for part in text.split(",")]
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from None

    try:
        model = Recommender.load(given.model)
        result = model.recommend(
            listed("history", given.history),
            given.k,
            not given.include_seen,
            ids("allow", given.allow),
            ids("block", given.block),
            values("ratings", given.ratings),
            values("times", given.times),
        )
    except (ArtefactError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.as_dict(), ensure_ascii=False, indent=2) if given.json else table(result))
    return 0
