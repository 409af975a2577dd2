"""python -m stages.shapes: what it refuses, how often it times, what its networks are."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sasrec.config import ModelParams
from stages import shapes


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    command.main()


@pytest.mark.parametrize("arguments", [["--batches", "0"], ["--batches", "1", "-2"], ["--repeats", "2"]])
def test_shapes_refuse_what_cannot_be_timed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "network", lambda shape: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="--batches starts at 1, and --repeats at 3"):
        run(shapes, monkeypatch, *arguments)


def test_small_batches_are_timed_more_often_and_what_was_widened_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[tuple[int, int]] = []

    def measured(own: Any, others: Any, histories: np.ndarray, repeats: int, clock: Any) -> dict[str, Any]:
        repeated.append((len(histories), repeats))
        return {"all": np.array([1.0, 2.0, 9.0])}

    monkeypatch.setattr(shapes, "quantized", lambda shape, bits, folder: 5)
    monkeypatch.setattr(shapes, "loading", lambda folder: {"load_ms": 1.0})
    monkeypatch.setattr(shapes, "measured", measured)
    for shortlisted, share in ((8, "0.250"), (0, "")):
        own = SimpleNamespace(widened=2, shortlisted=shortlisted)
        monkeypatch.setattr(shapes, "Recommender", SimpleNamespace(load=lambda path, own=own: own))
        repeated.clear()
        rows = shapes.rows_of("S", 4, (1, 2, 32), 12, {})
        assert repeated == [(1, 48), (2, 24), (32, 12)]
        assert {(row["all_ms"], row["widened"]) for row in rows} == {("2.000", share)}


def test_rows_of_a_timed_network_differ_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", {"S": (ModelParams(hidden=64, max_len=8, blocks=1), 200)})
    lengths = shapes.network("S").item_table.weight.detach().norm(dim=1)[1:].log()
    # By a factor e^0.3; lengths of 64 random numbers alone by 0.09.
    assert 0.25 < float(lengths.std()) < 0.4
