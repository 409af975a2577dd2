"""Small quantized models and their exported folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sasrec.config import ModelParams, QuantParams
from sasrec.deploy.artefact import Item, export
from sasrec.models.sasrec import SASRec
from sasrec.quant.attach import attach, calibrate, freeze, load_method
from sasrec.quant.frozen import FrozenTensor, from_tensors, to_tensors

ITEMS = 30
CATALOGUE = [Item(f"sku/{i}", f"Title {i}", ("a", "b") if i % 2 else (), i * 7 % 11) for i in range(1, ITEMS + 1)]
SMALL = {"max_len": 8, "hidden": 16}
# Of methods, where they are not the defaults.
OPTIONS = {"dorefa-paper": {"grid": "paper"}, "lsq-offset": {"offset": True}, "pq": {"splits": 4, "centroids": 8}}


def files_of(folder: Path) -> list[Path]:
    """The files of an exported folder."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def histories() -> torch.Tensor:
    made = torch.randint(1, ITEMS + 1, (64, 8), generator=torch.Generator().manual_seed(1))
    made[:20, :3] = 0
    return made


def build(**model: object) -> SASRec:
    torch.manual_seed(0)
    made = SASRec(ModelParams(**{**SMALL, **model}), ITEMS).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        # At the start of training the states hardly differ; these do.
        for name, parameter in made.named_parameters():
            if name.endswith("table.weight"):
                parameter.mul_(20)
    return made


def quantize(method: str, bits: int, model: dict[str, object], **quant: object) -> dict[str, FrozenTensor]:
    """The frozen tensors of a small model, as read back from its checkpoint."""
    made = build(**model)
    module, chosen = load_method(method.split("-")[0], OPTIONS.get(method))
    attach(made, QuantParams(bits=bits, **quant), module, chosen)  # type: ignore[arg-type]
    histories = [torch.randint(1, ITEMS + 1, (16, 8))]
    calibrate(made, histories)
    if hasattr(module, "reconstruct"):
        with torch.enable_grad():
            some = type(chosen)(**{"iterations": 20} if method == "adaround" else {"bias_correction": True})
            module.reconstruct(made, histories, some, 0)
    return from_tensors(*to_tensors(freeze(made.eval())))


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """Export a small model quantized by a method, or in full precision without one."""

    def make(method: str | None = "lsq", bits: int = 8, name: str = "model", model: dict[str, object] | None = None) -> Path:
        frozen = quantize(method, bits, model or {}) if method else {}
        folder = tmp_path / name
        export(folder, build(**(model or {})), frozen, CATALOGUE, {"valid_ndcg@10": 0.5, "data": "abc"})
        return folder

    return make
