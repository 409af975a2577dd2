"""What rounding each tensor alone costs, and mixed widths beside uniform ones: python -m stages.sensitivity

Of the trained quant.model with the first seed, after rounding alone, with activations at 8 bits where all are rounded. It does
not declare quant.bits, so that another width of the study does not run it again.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from sasrec.checkpoint import load_model
from sasrec.config import Study
from sasrec.data.sequences import Sequences
from sasrec.files import write_text
from sasrec.models.events import asked_by
from sasrec.process import set_up
from sasrec.quant.budgets import Assignment, assignments
from sasrec.quant.calibration import calibration
from sasrec.quant.centring import centre
from sasrec.quant.sensitivity import WIDTHS, Cost, Validation, measure
from stages.common import run

SECTIONS = (
    "seeds", "threads", "device", "model", "train", "per_model.<quant.model>",
    "quant.model", "quant.table", "quant.weights", "quant.stream", "quant.centre", "quant.calibration_batches",
)  # fmt: skip
SHOWN = (4, 2)  # bits of the table of single tensors


def as_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()


def alone(costs: Sequence[Cost]) -> str:
    """One row a tensor and width, the most sensitive first: bytes with scales, and the rise of the loss in nats."""
    ordered = sorted((cost for cost in costs if cost.bits in SHOWN), key=lambda cost: -cost.rise)
    rows = [(cost.tensor, cost.kind, cost.bits, cost.bytes, f"{cost.rise:.6f}") for cost in ordered]
    return as_csv(("tensor", "kind", "bits", "bytes", "loss_rise"), rows)


def together(full: float, found: Sequence[Assignment]) -> str:
    """One row an assignment: its loss and rise in nats, and how many bits each tensor has; the first is full precision."""
    rows: list[Sequence[object]] = [("full precision", 32, "", f"{full:.6f}", f"{0:.6f}", "")]
    for each in found:
        widths = "; ".join(f"{name} {bits}" for name, bits in each.widths.items())
        rows.append((each.name, each.bits, each.bytes, f"{full + each.rise:.6f}", f"{each.rise:.6f}", widths))
    return as_csv(("assignment", "bits", "bytes", "loss", "loss_rise", "widths"), rows)


def main(study: Study) -> None:
    device = set_up(study.threads, study.device)
    quant = study.quant
    _, train = study.of_model(quant.model)
    seed = study.seeds[0]
    store = Sequences.load(Path("data/prepared"))
    model, _ = load_model(Path("data/models", quant.model, str(seed)))
    model.to(device)
    histories = calibration(store, model, train.batch_size, quant.calibration_batches, seed, device)
    if quant.centre:
        centre(model, histories)
    validation = Validation(store, model.params.max_len, device, asked=asked_by(model))
    full, stored = measure(model, validation, quant, histories, WIDTHS, ("table", "weight"))
    _, activations = measure(model, validation, quant, histories, SHOWN, ("activation",))
    write_text(Path("plots/sensitivity.csv"), alone([*stored, *activations]))
    found = assignments(model, validation, quant, histories, full, stored)
    write_text(Path("plots/mixed.csv"), together(full, found))
    print(alone([*stored, *activations]), end="")
    print(f"validation loss in full precision: {full:.4f}")
    for each in found:
        print(f"{each.name}, {each.bits} bits: {each.bytes / 1000:.1f} kB, loss {each.rise:+.4f}")


if __name__ == "__main__":
    run(main, SECTIONS)
