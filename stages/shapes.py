"""Time networks of given shapes without training any: python -m stages.shapes [SHAPE ...] [--bits B ...] [--batches N ...]

Random weights, quantized by their largest magnitudes, exported, and run by the runtime, beside torch and onnxruntime. Sizes
and times depend on the shape alone. Times are those of the processor for one thread, medians of turns, which another process
on the same core does not lengthen by waiting. The rows of what was measured are replaced in metrics/reference/shapes.csv;
the README shows that table.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sasrec.benchmarking import PEERS, loading, measured
from sasrec.config import QuantParams
from sasrec.deploy.artefact import Item, export
from sasrec.deploy.recommender import Recommender
from sasrec.errors import UserError
from sasrec.machine import processor, processor_flags
from sasrec.measurements import replace_rows
from sasrec.models.sasrec import SASRec
from sasrec.peers import Work, by_onnxruntime, by_torch
from sasrec.process import set_up
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.report.shapes import SHAPES

TABLE = Path("metrics/reference/shapes.csv")
COLUMNS = (
    "shape", "bits", "batch", "encode_ms", "score_ms", "all_ms", "all_p99_ms", *(f"{name}_ms" for name in PEERS),
    "bytes", "float32_bytes", "load_ms", "resident_mb", "widened", "cpu", "flags",
)  # fmt: skip


def network(shape: str) -> SASRec:
    """The shape with random weights of about the size that training gives them: rows of the table differ in length."""
    torch.manual_seed(0)
    params, items = SHAPES[shape]
    model = SASRec(params, items).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("table.weight"):
                parameter.normal_(std=0.1).mul_((0.3 * torch.randn(len(parameter), 1)).exp_())
            elif parameter.dim() == 2:
                parameter.normal_(std=params.hidden**-0.5)
    return model


def quantized(shape: str, bits: int, folder: Path) -> int:
    """Export the shape with weights and tables of `bits` and activations of 8; returns the bytes."""
    model = network(shape)
    module, options = load_method("ptq", {"range": "minmax"})
    attach(model, QuantParams(bits=bits, activation_bits=8), module, options)
    calibrate(model, [torch.randint(1, model.items + 1, (4, model.params.max_len)) for _ in range(2)])
    frozen = freeze(model)
    items = [Item(str(i)) for i in range(1, model.items + 1)]
    return export(folder, model, frozen, items, {"shape": shape}).bytes


def rows_of(shape: str, bits: int, batches: Sequence[int], repeats: int, others: dict[str, Work]) -> list[dict[str, str]]:
    """The rows of one shape at one width. others: what is timed beside it, by name."""
    params, items = SHAPES[shape]
    with tempfile.TemporaryDirectory() as temporary:
        size = quantized(shape, bits, Path(temporary))
        facts = loading(Path(temporary))
        model = Recommender.load(temporary)
        full = sum(parameter.numel() * 4 for parameter in network(shape).parameters())
        rows = []
        for batch in batches:
            histories = np.random.default_rng(0).integers(1, items + 1, (batch, params.max_len))
            times = measured(model, others, histories, max(repeats, repeats * 4 // batch), time.thread_time)
            row = {"shape": shape, "bits": str(bits), "batch": str(batch)}
            row |= {f"{name}_ms": f"{np.median(own):.3f}" for name, own in times.items()}
            row |= {"all_p99_ms": f"{np.percentile(times['all'], 99):.3f}", "bytes": str(size), "float32_bytes": str(full)}
            row |= {name: f"{value:.0f}" for name, value in facts.items()}
            share = f"{model.widened / model.shortlisted:.3f}" if model.shortlisted else ""
            row |= {"widened": share, "cpu": processor(), "flags": processor_flags()}
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; default: S M")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2], choices=range(2, 9), metavar="B")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], metavar="N")
    parser.add_argument("--repeats", type=int, default=12, help="timings behind each median, more for small batches")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too; half a minute a batch size")
    options = parser.parse_args()
    try:
        for shape in options.shapes:
            if shape not in SHAPES:
                raise UserError(f"unknown shape '{shape}'; known: {', '.join(SHAPES)}")
        if min(options.batches) < 1 or options.repeats < 3:
            raise UserError("--batches starts at 1, and --repeats at 3")
        set_up(1, "cpu")
        for shape in options.shapes or ["S", "M"]:
            plain = network(shape)
            others = {"torch": by_torch(plain)} | by_onnxruntime(plain, 1)
            if options.compile:
                others["torch_compile"] = by_torch(plain, compiled=True)
            for bits in options.bits:
                found = rows_of(shape, bits, options.batches, options.repeats, others)
                replace_rows(TABLE, found, ["shape", "bits", "batch"], COLUMNS, order)
    except UserError as error:
        sys.exit(f"error: {error}")


def order(row: Mapping[str, str]) -> tuple[int, int, int]:
    """Small shapes first, many bits first, small batches first."""
    return list(SHAPES).index(row["shape"]), -int(row["bits"]), int(row["batch"])


if __name__ == "__main__":
    main()
