"""The table of networks that were timed without training (`python -m stages.shapes`), for the README."""

import csv
from collections.abc import Mapping
from pathlib import Path

from sasrec.errors import UserError

SHAPES = {
    "S": "hidden 50, length 50, 2 blocks, 3,416 items",
    "M": "hidden 128, length 50, 3 blocks, 83,000 items",
    "L": "hidden 256, length 200, 2 blocks, 1,000,000 items",
}


def shapes(path: Path) -> str:
    """Markdown: sizes against float32, and milliseconds from histories to the ten best, beside others."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"a table names {path}, which does not exist; python -m stages.shapes makes it") from None
    lines = [
        "| shape | bits | times smaller | batch | ms | torch eager | torch.compile | onnxruntime float32 | its dynamic int8 | "
        "its static int8 | times faster than eager |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        smaller = int(row["float32_bytes"]) / int(row["bytes"])
        faster = float(row["torch_ms"]) / float(row["all_ms"])
        names = ("torch", "torch_compile", "onnxruntime_fp32", "onnxruntime_dynamic", "onnxruntime_static")
        times = [_ms(row, f"{name}_ms") for name in ("all", *names)]
        lines.append(
            f"| {row['shape']} | {row['bits']} | {smaller:.1f} | {row['batch']} | {' | '.join(times)} | {faster:.1f} |"
        )
    processors = "; ".join(dict.fromkeys(f"{row['cpu']} ({row['flags']})" for row in rows))
    described = "; ".join(f"{name}: {text}" for name, text in SHAPES.items() if any(row["shape"] == name for row in rows))
    return "\n".join(lines) + f"\n\n{described}. One thread of {processors}.\n"


def _ms(row: Mapping[str, str], column: str) -> str:
    """Three significant figures."""
    return f"{float(row[column]):.3g}" if row[column] else ""
