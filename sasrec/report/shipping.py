"""What the page says of the exported models as files and processes: latency beside others, memory, load time, and per tensor
the width it is stored and computed at."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sasrec.errors import UserError
from sasrec.files import read_json
from sasrec.report import markup

# Column of plots/benchmark/<variant>.csv and how the table heads it; a column that was not measured stays empty.
TIMES = {
    "encode_ms": "Encode ms", "encode_p99_ms": "Encode p99 ms", "score_ms": "Score ms", "score_p99_ms": "Score p99 ms",
    "sequences_per_second": "Sequences a second", "torch_ms": "torch eager ms", "torch_compile_ms": "torch.compile ms",
    "onnxruntime_fp32_ms": "onnxruntime float32 ms", "onnxruntime_dynamic_ms": "its dynamic int8 ms",
    "onnxruntime_static_ms": "its static int8 ms",
}  # fmt: skip


def section(names: Sequence[str]) -> str:
    """HTML for exported variants, and for the tensors of quantized ones, from what benchmark and evaluate wrote in the working
    directory."""
    measured = {name: _rows(Path("plots/benchmark", f"{name}.csv")) for name in names}
    described = {name: _described(Path("data/evaluated", name, "tensors.json")) for name in names}
    tensors = [_tensors(name, own) for name, own in described.items() if _is_quantized(own["tensors"].values())]
    return "\n".join([_latencies(measured), _processes(measured), *tensors])


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run `dvc repro` to make it") from None


def _described(path: Path) -> Mapping[str, Any]:
    try:
        content: Mapping[str, Any] = read_json(path)
        return {key: content[key] for key in ("tensors", "activations", "products", "float_operators")}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run `dvc repro` to make it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what evaluate writes; delete it and run `dvc repro`") from None


def _latencies(measured: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    shown = [name for name in TIMES if any(row.get(name) for rows in measured.values() for row in rows)]
    rows = [
        [variant, row["batch"], *(row.get(name) or "" for name in shown)] for variant, own in measured.items() for row in own
    ]
    processors = _each(measured, "flags")
    caption = (
        "Medians for a whole batch on this machine, all in one run, taking turns. Encode and score are the exported model; "
        "beside them the same network in full precision, from histories to the ten best, by torch and by onnxruntime, and what "
        f"onnxruntime's own quantization makes of it. Threads: {_each(measured, 'threads')}. Processor: {processors}."
    )
    return markup.table(
        "Latencies", caption, ("Variant", "Batch", *(TIMES[name] for name in shown)), [markup.row(cells) for cells in rows]
    )


def _each(measured: Mapping[str, Sequence[Mapping[str, str]]], column: str) -> str:
    values = dict.fromkeys(row.get(column) or "not known" for rows in measured.values() for row in rows)
    return "; ".join(values)


def _processes(measured: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    rows = [
        [variant, *(own[0].get(name) or "" for name in ("bytes", "load_ms", "resident_mb"))]
        for variant, own in measured.items()
        if own
    ]
    caption = (
        "A new process that loads the model, checks every hash and answers once: time to load, and memory then, with "
        "Python, numpy and onnxruntime."
    )
    return markup.table(
        "Processes", caption, ("Variant", "Bytes on disk", "Load ms", "Resident MB"), [markup.row(cells) for cells in rows]
    )


def _is_quantized(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any tensor is; which row an item has in a smaller table is packed in full precision, too."""
    return any(entry["bits"] < 32 for entry in entries if entry["kind"] != "index")


def _tensors(variant: str, described: Mapping[str, Any]) -> str:
    rows = [
        [
            name, f"{entry['bits']}", " x ".join(map(str, entry["shape"])), entry["compute"], entry.get("accumulator", "none"),
            f"{entry['bytes']:,}",
        ]
        for name, entry in described["tensors"].items()
    ]  # fmt: skip
    left = [name for name, kind in described["products"].items() if kind == "float32"]
    operators = ", ".join(f"{count} {name}" for name, count in described["float_operators"].items())
    widths = sorted(set(described["activations"].values()))
    text = (
        f"Activations: {', '.join(map(str, widths))} bits. " if widths else "Activations are not quantized. "
    ) + f"Left in float32: {operators}; matrix products: {', '.join(left) or 'none'}."
    caption = (
        "Bits as stored; in what its matrix products are computed, and what they are summed in. int8 with int32: products of "
        "integers. A table that is only looked up is computed in float32."
    )
    table = markup.table(
        f"Tensors of {variant}",
        caption,
        ("Tensor", "Bits", "Shape", "Computed", "Summed", "Bytes"),
        [markup.row(cells) for cells in rows],
    )
    return (
        f"<details>\n<summary>{escape(variant)}: {len(rows)} stored tensors, one by one</summary>\n"
        f'<p class="note">{escape(text)}</p>\n{table}\n</details>'
    )
