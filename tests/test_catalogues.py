"""python -m stages.catalogues: what it measures, keeps and refuses."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sasrec.errors import UserError
from sasrec.measurements import read_rows
from stages import catalogues as command


def test_a_row_has_every_column_measured_in_processes_of_their_own() -> None:
    row = command.row_of(300, 8, 6, 3)
    assert set(row) == set(command.COLUMNS)
    assert (row["items"], row["hidden"], row["validation_users"]) == ("300", "8", "6")
    measured = [name for name in row if name.endswith(("_ms", "_s", "_mb"))]
    assert len(measured) == 6 and all(float(row[name]) > 0 for name in measured if name.endswith("_ms"))  # of six users 0.0 s
    assert all(float(row[name]) > 50 for name in measured if name.endswith("_mb"))  # Python and torch alone take more


def test_what_a_process_says_when_it_fails_is_passed_on() -> None:
    with pytest.raises(UserError, match="steps of 300 items, in a process of its own: .*hidden"):
        command.row_of(300, -8, 6, 3)


def test_rows_of_the_same_size_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TABLE", tmp_path / "catalogues.csv")
    times = iter("123")

    def row_of(items: int, hidden: int, *rest: Any) -> dict[str, str]:
        made = dict.fromkeys(command.COLUMNS, "0")
        return made | {"items": str(items), "hidden": str(hidden), "dense_step_ms": next(times)}

    monkeypatch.setattr(command, "row_of", row_of)
    for arguments in (["200", "100"], ["200"]):
        monkeypatch.setattr(sys, "argv", ["catalogues", *arguments])
        command.main()
    rows = read_rows(command.TABLE, command.COLUMNS)
    assert [(row["items"], row["dense_step_ms"]) for row in rows] == [("100", "2"), ("200", "3")]


@pytest.mark.parametrize("arguments", [["0"], ["--hidden", "0"], ["--rounds", "2"]])
def test_sizes_that_cannot_be_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Measured and written into the committed table, were they not refused.
    monkeypatch.setattr(command, "row_of", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["catalogues", *arguments])
    with pytest.raises(SystemExit, match="start at 1, and --rounds at 3"):
        command.main()


def test_catalogues_are_listed_by_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TABLE", tmp_path / "catalogues.csv")

    def row_of(items: int, hidden: int, *rest: Any) -> dict[str, str]:
        return dict.fromkeys(command.COLUMNS, "0") | {"items": str(items), "hidden": str(hidden)}

    monkeypatch.setattr(command, "row_of", row_of)
    for hidden in ("128", "64"):
        monkeypatch.setattr(sys, "argv", ["catalogues", "1000", "200", "--hidden", hidden])
        command.main()
    found = [(row["items"], row["hidden"]) for row in read_rows(command.TABLE)]
    assert found == [("200", "64"), ("200", "128"), ("1000", "64"), ("1000", "128")]


def test_steps_are_medians_of_those_after_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two trainers in turn; each predicts the next item."""
    now = [0.0]
    taken: list[int] = []

    class Steps:
        def __init__(self, seconds: list[float]) -> None:
            self.seconds = iter(seconds)
            self.model = SimpleNamespace(items=9, train=lambda: None)

        def _loss(self, *given: Any) -> None: ...

        def _step(self, work: Callable[..., Any], expected: int) -> None:
            batch = work.args[0]  # type: ignore[attr-defined]
            assert (batch.histories[:, 1:] == batch.targets[:, :-1]).all() and not (batch.histories == batch.targets).all()
            taken.append(id(self))
            now[0] += next(self.seconds)

    monkeypatch.setattr("time.process_time", lambda: now[0])
    made: list[Any] = [Steps([50, 60, 1, 9, 2]), Steps([70, 80, 3, 4, 90])]
    assert command.steps(made, 3) == pytest.approx([2000, 4000])
    assert taken == [id(one) for _ in range(5) for one in made]


def test_random_users_have_a_full_window_and_two_held_out() -> None:
    store = command.RandomStore(3, 5)
    assert np.diff(store.offsets).tolist() == [command.LENGTH + 2] * 3
    assert (store.offsets[1:] - store.held("validation").positions).tolist() == [2] * 3
    assert store.items.min() >= 1 and store.items.max() <= 5
