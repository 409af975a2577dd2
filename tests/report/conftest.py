"""A study small enough to check by hand, with every file the report reads, written by the code that writes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sasrec import protocol
from sasrec.config import EvaluateParams, QuantParams, Study
from sasrec.curves import Row, write_curves
from sasrec.evaluation import Ranks
from sasrec.files import write_json, write_text

STATS = {
    "dataset": "toy", "sha256": "0" * 64, "users": 6, "items": 30, "interactions": 60, "length": {"median": 9}, "evaluated": 5,
    "candidates": 100, "candidates_seed": 0, "few_candidates": 0, "filter": {"min_user": 5},
    "few_popular_candidates": 0, "split": {"split": "leave_one_out"}, "time_unit": None,
}  # fmt: skip
EVALUATE = EvaluateParams(bootstrap=200)
RANKS = {
    "popularity": [20, 15, 9, 30, 11],
    "markov": [5, 12, 4, 30, 9],
    "sasrec": [1, 1, 3, 7, 20],
    "control": [1, 1, 2, 7, 20],
    "ptq": [2, 2, 4, 8, 25],
    "lsq": [1, 3, 2, 1, 20],
}
SENSITIVITY = """\
tensor,kind,bits,bytes,loss_rise
item_table.weight,table,2,550,0.900000
final,activation,2,0,0.400000
item_table.weight,table,4,1050,0.030000
final,activation,4,0,-0.001000
"""
MIXED = """\
assignment,bits,bytes,loss,loss_rise,widths
full precision,32,,2.000000,0.000000,
uniform,8,2048,2.001000,0.001000,item_table.weight 8; a.weight 8
uniform,4,1050,2.030000,0.030000,item_table.weight 4; a.weight 4
budget,4,1040,2.020000,0.020000,item_table.weight 4; a.weight 3
same loss,4,900,2.025000,0.025000,item_table.weight 3; a.weight 8
"""


@pytest.fixture
def study() -> Study:
    return Study(
        models=("sasrec",), quantized=("control", "ptq", "lsq"), variants=("sasrec", "control", "ptq", "lsq"),
        seeds=(0,), quant=QuantParams(bits=4), evaluate=EVALUATE,
    )  # fmt: skip


def write_variant(name: str, seeds: tuple[int, ...] = (0,), card: object = None) -> None:
    """Metrics, ranks, curves and latencies of one variant in the working directory."""
    protocol_card = protocol.card(STATS, EVALUATE) if card is None else {"other": card}
    ranks = np.array(RANKS[name], np.float32)
    results = [Ranks(ranks, np.minimum(ranks, 3), np.minimum(ranks, 5), np.ones(31, np.int64)) for _ in seeds]
    quantized = name in ("ptq", "lsq")
    size = {
        "bits": 4 if quantized else 32,
        "bytes": 10_000 if quantized else 80_000,
        "embedding_bytes": 6_000,
        "weight_bytes": 3_000,
    }
    validation = {"ptq": 0.3, "lsq": 0.4}.get(name, 0.5)
    write_json(f"metrics/{name}.json", protocol.flat_metrics(results, EVALUATE, protocol_card, [size], validation))
    protocol.write_ranks(Path("data/evaluated", name), results, seeds, protocol_card)
    agreement = {"users": 4, "steps": 1 if name == "lsq" else 0, "same_top10": 0.999, "ndcg@10_difference": -0.0001}
    write_json(Path("data/evaluated", name, "agreement.json"), [agreement for _ in seeds])
    rows = [Row(epoch, 0.001, None if epoch == 0 else 2.0, 2.5 - epoch / 9, None, 0.5, 0.1 * epoch) for epoch in range(4)]
    for seed in seeds:
        write_curves(Path(f"plots/curves/{name}-{seed}.csv"), rows[:1] if name == "ptq" else rows)
    write_text(
        f"plots/benchmark/{name}.csv",
        "batch,encode_ms,score_ms,sequences_per_second,torch_ms,torch_compile_ms,bytes,resident_mb,load_ms,threads,flags\n"
        "1,1.5,0.2,588,3.25,,10000,61,13,1,avx2 avx512_vnni\n32,4,1,6400,9.75,,10000,61,13,1,avx2 avx512_vnni\n",
    )
    entry = {"kind": "table", "bits": 4, "shape": [31, 16], "compute": "int8", "accumulator": "int32", "bytes": 248}
    tensors = {"item_table.weight": entry if quantized else {**entry, "bits": 32, "compute": "float32"}}
    # Which row each item has in a smaller table is packed whether the model is quantized or not.
    tensors["coarse.item_table.rows.0"] = {"kind": "index", "shape": [31], "bits": 4, "compute": "none", "bytes": 16}
    products = {"scoring": "int8" if quantized else "float32"}
    described = {"tensors": tensors, "activations": {"final": 8} if quantized else {}, "products": products}
    write_json(Path("data/evaluated", name, "tensors.json"), described | {"float_operators": {"Softmax": 2, "Add": 9}})


@pytest.fixture
def writer() -> Callable[..., None]:
    return write_variant


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, with the files of the study."""
    monkeypatch.chdir(tmp_path)
    write_json("data/prepared/stats.json", STATS)
    for name in RANKS:
        write_variant(name)
    write_text("plots/sensitivity.csv", SENSITIVITY)
    write_text("plots/mixed.csv", MIXED)
    return tmp_path
