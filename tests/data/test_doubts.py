"""What is read as it stands but looks wrong is said when the data is prepared, and kept in stats.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ALL = {"min_user": 1, "min_item": 1, "candidates": 2}
TIMED = "user,item,timestamp\nu,a,{0}\nu,b,{1}\nu,c,{2}\nu,d,{2}\n"
SECONDS = (1271605308, 1271605400, 1271700000)


@pytest.fixture
def notes(stage: Callable[..., None], project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """notes(text, **dataset): those of a csv file, which are those that are printed."""

    def call(text: str, name: str = "mine.csv", **dataset: Any) -> list[str]:
        (project / name).write_text(text)
        sections = {"dataset": {"name": "file", "path": name, **dataset}, "prepare": ALL}
        stage("fetch", **sections)
        stage("prepare", **sections)
        stats = json.loads((project / "data/prepared/stats.json").read_text())
        printed = [line.removeprefix("note: ") for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        found: list[str] = stats.get("notes", [])
        assert printed == found and ("notes" in stats) == bool(found)
        return found

    return call


Notes = Callable[..., list[str]]


@pytest.mark.parametrize(
    "times",
    [
        SECONDS,
        tuple(1000 * time for time in SECONDS),
        tuple(10**9 * time for time in SECONDS),
        ("2010-04-18", "2010-04-19", "1969-12-31"),
        (0, *SECONDS[1:]),  # never given
        (1.5, *SECONDS[1:]),
    ],
)
def test_nothing_is_said_of_usual_times(notes: Notes, times: tuple[Any, ...]) -> None:
    assert notes(TIMED.format(*times)) == []


def test_no_times_in_a_file_with_columns(notes: Notes) -> None:
    text = "user,item,time\nu,a,5\nu,b,3\nu,c,1\nu,d,1\n"
    (said,) = notes(text)
    assert said.startswith("there is no column 'timestamp', so the order of the rows counts")
    assert notes(text, columns={"timestamp": None}) == []
    lines = "".join(f'{{"user": 1, "item": {item}}}\n' for item in range(4))
    assert notes(lines, "mine.jsonl") == [said]
    assert notes("u a\nu b\nu c\nu d\n", "mine.txt", format="user-item") == []  # which has none ever


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((SECONDS[0], 1000 * SECONDS[1], 1000 * SECONDS[2]), "1 of 4 times look like s since 1970, the others like ms"),
        ((SECONDS[0], SECONDS[1], 10**6 * SECONDS[2]), "2 of 4 times look like s since 1970, the others like us"),
        ((20100418, 20100419, 20100501), "the last time is 20100501, which as seconds since 1970 is 1970-08-21: their order"),
        ((1, 2, 3), "the last time is 3, which as seconds since 1970 is 1970-01-01: their order counts"),
    ],
)
def test_times_of_two_units_and_numbers_that_are_no_seconds(notes: Notes, times: tuple[int, ...], said: str) -> None:
    found = notes(TIMED.format(*times))
    assert len(found) == 1 and found[0].startswith(said)


@pytest.mark.parametrize(
    ("times", "unit", "year"),
    [((20110315185817, 20110315185818, 20110315185819), "ms", 2607), (("40617.5", "40617.75", "40618.25"), "s", 3257)],
)
def test_numbers_beyond_any_time(notes: Notes, times: tuple[Any, ...], unit: str, year: int) -> None:
    """Dates as digits, and days as workbooks count them, in fractions."""
    (said,) = notes(TIMED.format(*times))
    assert said.startswith(f"the last time, taken as {unit} since 1970, is in the year {year}: their order counts")


def test_ids_of_whole_numbers_written_as_decimals(notes: Notes) -> None:
    said = notes("user,item,timestamp\n1.0,a,{}\n1.0,b,{}\n1.0,c.0,{}\n1.0,d,{}\n".format(*SECONDS, SECONDS[2]))
    assert [note.partition(",")[0] for note in said] == ["all user ids end in .0"]


def rows_of(users: int, *items: str, times: tuple[int, ...] = (0, 1, 2, 3)) -> str:
    rows = (f"{u},{i},{SECONDS[0] + 100 * u + t}\n" for u in range(users) for i, t in zip(items, times, strict=True))
    return "user,item,timestamp\n" + "".join(rows)


def test_what_rows_repeat_or_leave_open(notes: Notes) -> None:
    assert notes(rows_of(10, *"abcd")) == []
    (said,) = notes(rows_of(10, *"abca"))
    assert said.startswith("10 of 10 test targets are items that the user has had before")
    (said,) = notes(rows_of(10, *"abcd", times=(0, 1, 2, 2)))
    assert said.startswith("the last two events of 10 of 10 users have the same time")
    (said,) = notes(rows_of(10, *"aabc", times=(0, 0, 1, 2)))
    assert said.startswith("10 of 40 rows are the same as others")
    # The last but one, which is for validation, is no test target; and of a few users nothing is said.
    assert notes(rows_of(10, *"abac")) == []
    assert notes(rows_of(9, *"abca", times=(0, 1, 2, 2))) == []


def test_who_says_that_only_the_order_counts_is_not_told_so(notes: Notes) -> None:
    assert notes(TIMED.format(1, 2, 3), times="order") == []


def test_ids_with_spaces_around_them(notes: Notes) -> None:
    found = notes("user,item,timestamp\nu, a,{0}\nu,a,{1}\nu,b,{2}\nu,c,{2}\nv ,b,{2}\n".format(*SECONDS))
    assert [note.partition("; ")[0] for note in found] == [
        "1 of 2 user ids begin or end with a space, such as 'v '",
        "1 of 4 item ids begin or end with a space, such as ' a'",
    ]
