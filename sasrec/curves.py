"""The curves of a training: a line for each validation."""

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path

from sasrec.files import write_text


@dataclass(frozen=True)
class Row:
    """One line of the curves. Epoch 0 is the state before training. Losses are means over positions (train) or users
    (validation); accuracies are pairwise; ndcg is NDCG@10 on validation under the protocol of `train.select_on`."""

    epoch: int
    lr: float
    train_loss: float | None
    validation_loss: float
    train_accuracy: float | None
    validation_accuracy: float
    validation_ndcg: float


def write_curves(path: Path, rows: list[Row]) -> None:
    """The curves as CSV, six significant digits, empty where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    for row in rows:
        values = list(asdict(row).values())
        writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
    write_text(path, text.getvalue())
