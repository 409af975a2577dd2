"""The exported model: one safetensors file with packed integers, and a manifest that says what is in it.

`model.safetensors` holds, for a quantized weight or table, its packed codes under the tensor's name and its scales under
`<name>/scale` (and `<name>/shift` where the grid is not centred); for a quantized activation only the grid; everything else
(biases, norms) in float32. Levels that are not consecutive integers are a table `levels/<k>`, stored once for all tensors
that have the same.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sasrec import __version__
from sasrec.checkpoint import load_tensors, save_tensors
from sasrec.config import ModelParams, from_mapping
from sasrec.deploy.packing import pack, unpack
from sasrec.errors import UserError
from sasrec.files import read_json, sha256, write_json
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import taps
from sasrec.quant.frozen import FrozenTensor, thaw
from sasrec.quant.grid import Grid

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes on disk: of the whole artefact, and of what the tables and the weight matrices take in it with their scales.
    bits: the mean width of the stored weights and table entries."""

    bytes: int
    embedding_bytes: int
    weight_bytes: int
    bits: float


def export(folder: Path, model: SASRec, frozen: dict[str, FrozenTensor], card: dict[str, Any]) -> Sizes:
    """Write the artefact of `model` into `folder`. card: what else the manifest says of it (data, training)."""
    stored: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    tables: dict[tuple[float, ...], str] = {}
    for name, item in frozen.items():
        grid = item.grid
        if item.codes is not None:
            stored[name] = torch.from_numpy(pack(item.codes.numpy(), grid.bits))
        entry: dict[str, Any] = {} if item.codes is None else {"shape": list(item.codes.shape)}
        entry |= {"bits": grid.bits, "levels": len(grid.levels)}
        if grid.is_uniform:
            entry["lowest"] = int(grid.levels[0])
        else:
            entry["table"] = tables.setdefault(tuple(grid.levels.tolist()), f"levels/{len(tables)}")
            stored[entry["table"]] = grid.levels
        described[name] = entry
        stored[f"{name}/scale"] = grid.scale
        if bool((grid.shift != 0).any()):
            stored[f"{name}/shift"] = grid.shift
    stored |= {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    path = folder / "model.safetensors"
    save_tensors(path, stored)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "model": dataclasses.asdict(model.params),
        "items": model.items,
        **card,
        "tensors": described,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}},
    }
    write_json(folder / "manifest.json", manifest)
    return sizes(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; export the model with `dvc repro`") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON; export the model again with `dvc repro`") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of format {FORMAT}; export the model again with `dvc repro`")
    return manifest


def load(folder: Path) -> tuple[SASRec, dict[str, Any]]:
    """The model of an artefact, computing on the grids' values, and its manifest.

    Raises UserError where a file is missing, was changed after the export, or does not fit the manifest.
    """
    manifest = _manifest(folder)
    for name, facts in manifest["files"].items():
        if not (folder / name).exists() or sha256(folder / name) != facts["sha256"]:
            raise UserError(f"{folder / name} is not the file its manifest describes; export the model again")
    stored, _ = load_tensors(folder / "model.safetensors")
    model = SASRec(from_mapping(ModelParams, manifest["model"], "model"), manifest["items"])
    frozen = {}
    for name, entry in manifest["tensors"].items():
        scale = stored[f"{name}/scale"]
        if "table" in entry:
            levels = stored[entry["table"]]
        else:
            levels = torch.arange(entry["lowest"], entry["lowest"] + entry["levels"], dtype=torch.float32)
        grid = Grid(entry["bits"], levels, scale, stored.get(f"{name}/shift", torch.zeros(())))
        codes = None
        if "shape" in entry:
            codes = torch.from_numpy(unpack(stored[name].numpy(), grid.bits, tuple(entry["shape"])))
        frozen[name] = FrozenTensor(grid, codes)
    plain = {name: tensor for name, tensor in stored.items() if "/" not in name and name not in frozen}
    model.load_state_dict({**{name: model.state_dict()[name] for name in frozen if frozen[name].codes is not None}, **plain})
    thaw(model, frozen)
    return model.eval(), manifest


def sizes(folder: Path) -> Sizes:
    """Sizes of the artefact in `folder`."""
    manifest = _manifest(folder)
    stored, _ = load_tensors(folder / "model.safetensors")
    model = SASRec(from_mapping(ModelParams, manifest["model"], "model"), manifest["items"])
    took = {"table": 0, "weight": 0}
    elements = width = 0
    for name, tap in taps(model).items():
        if tap.kind == "activation":
            continue
        took[tap.kind] += sum(tensor.nbytes for key, tensor in stored.items() if key == name or key.startswith(f"{name}/"))
        count = tap.rows * tap.features
        elements += count
        width += count * (manifest["tensors"][name]["bits"] if name in manifest["tensors"] else 32)
    total = sum(file.stat().st_size for file in folder.iterdir())
    return Sizes(total, took["table"], took["weight"], width / elements)
