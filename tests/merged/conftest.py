"""Kept references that are parts of a grid, with ranks that are made up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sasrec import reference
from sasrec.config import EvaluateParams
from sasrec.files import read_json, write_json
from sasrec.protocol import PROTOCOLS, quality, short_hash
from stages import reference as command
from tests.conftest import ROOT

CARD = {"data": "toy", "users": 40, "items": 30}
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
USERS = 40
BASE = np.random.default_rng(0).integers(1, 9, USERS).astype(float)

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """make(name, ranks by variant, sizes, seeds, quant, ...) -> a kept reference in a folder of parts. Ranks are the same for
    every seed but for one user's."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, shifts: dict[str, float], seed: int = 0, size: int = 1000, **changed_params: Any) -> Path:
        models = [variant for variant in shifts if variant in ("sasrec", "h8", "h16")]
        quantized = [variant for variant in shifts if variant not in models]
        per_model: dict[str, Any] = {model: {} for model in models} | {"sasrec": {}}
        params = PARAMS | {"models": models, "quantized": quantized, "variants": list(shifts), "seeds": [seed]}
        # One rate at all widths, so that there is one control.
        params |= {"per_model": per_model, "quant": PARAMS["quant"] | {"lr": 0.0002} | changed_params.pop("quant", {})}
        params |= {"evaluate": PARAMS["evaluate"] | {"bootstrap": 200}} | changed_params
        folder = tmp_path / "parts" / name
        (folder / "ranks").mkdir(parents=True)
        variants = {}
        for variant, shift in shifts.items():
            ranks = BASE + shift
            ranks[seed] += 1
            for protocol in PROTOCOLS:
                reference.rank_file(folder, variant, seed, protocol).write_bytes(reference.packed(ranks))
            (folder / f"{variant}-{seed}.csv").write_text(f"epoch,lr\n0,{shift}\n")
            own = 4 * size if variant in models or variant == "control" else size
            sizes = {"bits": 4, "bytes": {"h8": 1500, "h16": 2500}.get(variant, own), "embedding_bytes": 1, "weight_bytes": 1}
            values = quality(dict.fromkeys(PROTOCOLS, ranks[None]), EvaluateParams(bootstrap=200))
            validation = {"coverage@10": 0.5, "valid_ndcg@10": 1 / (2 + shift)}
            variants[variant] = values | validation | sizes | {"card": short_hash(CARD)}
        (folder / "dvc.lock").write_text(f"of: {name}\n")
        content = {
            "command": f"dvc exp run -S 'seeds=[{seed}]'", "params": params,
            "environment": {"seconds": 60, "cpu": "x", "threads": 1},
            "data": {"file": "raw.txt", "sha256": "0" * 64}, "card": CARD,
            "tried": {"count": 0, "configurations": [], "test_reads": 1}, "published": [], "variants": variants,
            "comparisons": [],
        }  # fmt: skip
        write_json(folder.with_suffix(".json"), content)
        return folder.with_suffix(".json")

    return write


WHOLE = {"sasrec": 0.0, "control": 0.0}


def merge(*parts: Path) -> dict[str, Any]:
    command.merge("bits", [str(part) for part in parts])
    content: dict[str, Any] = read_json("metrics/reference/bits.json")
    return content
