"""How an artefact and its simulation are compared."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sasrec.deploy.simulation import Agreement
from sasrec.quant.frozen import FrozenTensor
from sasrec.quant.grid import Grid

ONE = torch.ones(())


def test_an_agreement_is_of_the_worst_and_of_all_that_was_added() -> None:
    """Two batches of states on the levels -128 to 127, of which 2 is the scale."""
    codes = iter(np.array(batch, np.uint8)[:, None] for batch in ([[128, 4], [130, 7]], [[129, 198]]))
    states = iter(torch.tensor(batch)[:, None] for batch in ([[0.0, -256.0], [4.2, -242.0]], [[2.0, 142.0]]))
    # Eleven items behind padding, which is none. One of the users has his last two of ten exchanged; the last has another
    # score of padding.
    base = np.arange(12, 0, -1, dtype=np.float32)
    exchanged, padding = base.copy(), base.copy()
    exchanged[[9, 10]], padding[0] = exchanged[[10, 9]], -5
    scores = iter([np.stack([base, base]), base[None]])
    expected = iter([torch.from_numpy(np.stack([base, exchanged])), torch.from_numpy(padding[None])])
    frozen = {"final": FrozenTensor(Grid.uniform(8, -128, 127, 2 * ONE), None)}
    simulation: Any = SimpleNamespace(frozen=frozen, encode=lambda part: next(states), scores=lambda own: next(expected))
    runtime: Any = SimpleNamespace(encode=lambda *given: next(codes), scores_of=lambda state: next(scores))
    agreement = Agreement(simulation, runtime)
    for users in (2, 1):
        found = agreement.exported(torch.ones(users, 3, dtype=torch.int64))
        assert found.tolist() == [base.tolist()] * users
        agreement.simulated(torch.ones(users, 3, dtype=torch.int64))
    assert agreement.steps == 4  # -128 in place of -124
    assert agreement.difference == 8
    summary = agreement.summary()
    assert (summary["users"], summary["same_elements"], summary["same_top10"]) == (3, 4 / 6, 2 / 3)
