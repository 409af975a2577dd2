"""What rounding each tensor alone costs: python -m stages.sensitivity [SEED]

Rounds one tensor of the trained quant.model at a time to 4 and to 2 bits, after training, and measures by how much the
validation loss rises. Writes plots/sensitivity.csv and plots/sensitivity.png. No stage depends on it: quant.budget_kb and
quant.max_drop measure for themselves.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from sasrec.checkpoint import load_model
from sasrec.config import Study
from sasrec.data.batches import epoch_batches
from sasrec.data.sequences import Sequences
from sasrec.files import write_text
from sasrec.models.events import asked_by, gather
from sasrec.process import set_up
from sasrec.quant.sensitivity import Cost, Validation, measure
from sasrec.report.bars import sensitivity
from sasrec.report.figures import write_figure
from stages.common import run

SECTIONS = ("seeds", "threads", "device", "model", "train", "per_model.<quant.model>", "quant")
WIDTHS = (4, 2)


def as_csv(costs: Sequence[Cost]) -> str:
    """One row a tensor and width, the most sensitive first: bytes with scales, and the rise of the loss in nats."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("tensor", "kind", "bits", "bytes", "loss_rise"))
    for cost in sorted(costs, key=lambda cost: -cost.rise):
        writer.writerow((cost.tensor, cost.kind, cost.bits, cost.bytes, f"{cost.rise:.6f}"))
    return text.getvalue()


def main(study: Study, seed: str = "") -> None:
    device = set_up(study.threads, study.device)
    chosen = seed or str(study.seeds[0])
    _, train = study.of_model(study.quant.model)
    store = Sequences.load(Path("data/prepared"))
    model, _ = load_model(Path("data/models", study.quant.model, chosen))
    model.to(device)
    batches = epoch_batches(store, model.params.max_len, train.batch_size, False, int(chosen), 0, "shuffled").batches
    asked = asked_by(model)
    histories = [
        gather(store, batch.histories, batch.places, asked).to(device)
        for batch, _ in zip(batches, range(study.quant.calibration_batches), strict=False)
    ]
    validation = Validation(store, model.params.max_len, device, asked=asked)
    full, costs = measure(model, validation, study.quant, histories, WIDTHS)
    write_text(Path("plots/sensitivity.csv"), as_csv(costs))
    write_figure(Path("plots/sensitivity.png"), sensitivity, costs, full)
    print(as_csv(costs), end="")
    print(f"validation loss in full precision: {full:.4f}; chart: plots/sensitivity.png")


if __name__ == "__main__":
    run(main, SECTIONS)
