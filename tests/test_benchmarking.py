"""What is timed beside an exported model computes the same network, everything takes turns, the table holds what was timed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sasrec.benchmarking import PEERS, times_ms
from sasrec.config import ModelParams
from sasrec.machine import processor, processor_flags
from sasrec.measurements import as_csv, read_rows
from sasrec.models.sasrec import SASRec
from sasrec.peers import by_onnxruntime, by_torch
from sasrec.report.shapes import shapes
from stages import shapes as command

HISTORIES = np.random.default_rng(0).integers(1, 61, (3, 8))


@pytest.fixture
def model() -> SASRec:
    torch.manual_seed(0)
    made = SASRec(ModelParams(max_len=8, hidden=16), 60).eval()
    with torch.no_grad():
        made.item_table.weight.mul_(20)
    return made


def test_works_take_turns_and_the_first_of_a_turn_does_not_count() -> None:
    called, now = [], [0.0]

    def work(name: str, seconds: float) -> None:
        called.append(name)
        now[0] += seconds

    works = {"a": lambda: work("a", 1), "b": lambda: work("b", 2)}
    found = times_ms(works, 4, lambda: now[0])
    assert "".join(called) == "aaaabbbbaabb"  # three of a turn count, then one
    assert {name: times.tolist() for name, times in found.items()} == {"a": [1000.0] * 4, "b": [2000.0] * 4}


def test_peers_rank_as_the_network_does(model: SASRec) -> None:
    best = by_torch(model)(HISTORIES).indices.numpy()
    works = by_onnxruntime(model, 1)
    assert {"torch", "torch_compile", *works} == set(PEERS)
    items = {name: work(HISTORIES)[0][1] for name, work in works.items()}
    with_padding = [[item for item in row if item] for row in best]  # torch's may hold padding, which has no meaning
    for row, own in zip(with_padding, items["onnxruntime_fp32"], strict=True):
        assert own[: len(row)].tolist() == row
    for name in ("onnxruntime_dynamic", "onnxruntime_static"):
        shared = [len(set(a) & set(b)) for a, b in zip(items[name], items["onnxruntime_fp32"], strict=True)]
        assert np.mean(shared) >= 7, name


def test_peers_of_fewer_items_than_are_asked_for() -> None:
    torch.manual_seed(0)
    few = SASRec(ModelParams(max_len=8, hidden=16), 7).eval()
    histories = np.ones((1, 8), np.int64)
    assert by_torch(few)(histories).indices.shape == (1, 8)  # padding has a row, too
    for name, work in by_onnxruntime(few, 1).items():
        assert np.asarray(work(histories)[0][1]).shape[-1] <= 7, name


def test_name_and_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    first = "processor : 0\nmodel name\t: Some CPU: 2\nflags\t\t: fpu avx2 avx512_vnni\n"
    path.write_text(first + "processor : 1\nmodel name\t: Another\nflags\t\t: fpu\n")
    assert processor(path) == "Some CPU: 2" and processor(tmp_path / "nothing")
    assert processor_flags(path) == "avx2 avx512_vnni"
    assert processor_flags(tmp_path / "nothing") == ""


def test_a_shape_is_timed_and_its_rows_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "TABLE", tmp_path / "shapes.csv")
    monkeypatch.setattr(command, "SHAPES", {"S": (ModelParams(hidden=16, max_len=8), 60)})

    def run(*arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["shapes", *arguments])
        command.main()
        return read_rows(command.TABLE)

    rows = run("S", "--bits", "4", "8", "--batches", "2", "1", "--repeats", "3")
    assert [(row["bits"], row["batch"]) for row in rows] == [("8", "1"), ("8", "2"), ("4", "1"), ("4", "2")]
    assert all(float(row["all_ms"]) > 0 and float(row["onnxruntime_static_ms"]) > 0 for row in rows)
    assert rows[0]["torch_compile_ms"] == ""
    assert int(rows[0]["float32_bytes"]) == sum(p.numel() * 4 for p in command.network("S").parameters())
    assert len(run("S", "--bits", "8", "--batches", "1", "--repeats", "3")) == 4
    rows = read_rows(command.TABLE)
    for row, own, dynamic in zip(rows, ("1", "2", "3", "4"), ("0.9", "20", "2", "4"), strict=True):
        row |= {"all_ms": own, "onnxruntime_dynamic_ms": dynamic}
    (tmp_path / "shapes.csv").write_text(as_csv(rows, command.COLUMNS))
    lines = shapes(tmp_path / "shapes.csv").splitlines()
    assert len([line for line in lines if line.startswith("| S |")]) == 4
    assert lines[-1].endswith("is faster in 2 of 4 rows.")
    with pytest.raises(SystemExit, match="error: unknown shape 'X'; known: S"):
        run("X")
    (tmp_path / "shapes.csv").write_text("shape,bits\nS,8\n")
    with pytest.raises(SystemExit, match="has other columns"):
        run("S", "--bits", "8", "--batches", "1", "--repeats", "3")
