"""The table of networks that were timed without training (`python -m stages.shapes`), for the README."""

from collections.abc import Mapping
from pathlib import Path

from sasrec.config import ModelParams
from sasrec.measurements import shown_rows

# S: MovieLens-1M as the SASRec paper has it. M: a shop. L: a large one, with long histories. And the number of items.
SHAPES = {
    "S": (ModelParams(hidden=50, max_len=50, blocks=2), 3_416),
    "M": (ModelParams(hidden=128, max_len=50, blocks=3), 83_000),
    "L": (ModelParams(hidden=256, max_len=200, blocks=2), 1_000_000),
}


def shapes(path: Path) -> str:
    """Markdown: sizes against float32, and milliseconds from histories to the ten best, beside others."""
    rows = shown_rows(path, "stages.shapes")
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
    described = "; ".join(
        f"{name}: hidden {params.hidden}, length {params.max_len}, {params.blocks} blocks, {items:,} items"
        for name, (params, items) in SHAPES.items()
        if any(row["shape"] == name for row in rows)
    )
    beaten = sum(float(row["onnxruntime_dynamic_ms"]) < float(row["all_ms"]) for row in rows)
    other = (
        f"onnxruntime's own dynamic int8, which has 8 bits at any of these widths, is faster in {beaten} of {len(rows)} rows."
    )
    return "\n".join(lines) + f"\n\n{described}. One thread of {processors}. {other}\n"


def _ms(row: Mapping[str, str], column: str) -> str:
    """Three significant figures."""
    return f"{float(row[column]):.3g}" if row[column] else ""
