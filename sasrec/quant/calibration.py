"""Training histories that scales are set on."""

from typing import Any

import torch

from sasrec.data.batches import epoch_batches
from sasrec.models.events import Histories, asked_by, gather


def calibration(store: Any, model: Any, batch_size: int, batches: int, seed: int, device: torch.device) -> list[Histories]:
    """The ends of the histories in the first `batches` batches of epoch 0, which no training has (it begins with 1): (batch,
    length) each, with what `model` asks for of each event."""
    drawn = epoch_batches(store, model.params.max_len, batch_size, False, seed, 0, "shuffled").batches
    asked = asked_by(model)
    return [
        gather(store, batch.histories, batch.places, asked).to(device) for batch, _ in zip(drawn, range(batches), strict=False)
    ]
