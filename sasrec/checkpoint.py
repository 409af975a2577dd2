"""Checkpoints: safetensors and JSON, never pickled objects, whole or absent."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sasrec.config import ModelParams
from sasrec.errors import UserError
from sasrec.files import atomic, read_json, sha256, write_json
from sasrec.mapping import from_mapping
from sasrec.models import registry
from sasrec.models.registry import Model


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: Any = None) -> None:
    """Write tensors, and `meta` as JSON in the header. The same content always gives the same bytes: the header's own map
    is written in arbitrary order, so all of `meta` is one entry of it."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    with atomic(path) as temporary:
        # Not save_file: its own error on a full disk hides the system's.
        temporary.write_bytes(save(plain, {"meta": json.dumps(meta, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the meta of a file of `save_tensors`. Raises UserError where the file is broken."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "null"))
        return load_file(path), meta
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run `dvc repro` to make it") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); delete it and run `dvc repro`") from None


def save_model(folder: Path, model: Model, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write `model.safetensors` and `model.json` (the model's parameters and `card`) into `folder`. A card of another model,
    from which this one was made, says nothing of its shape."""
    save_tensors(folder / "model.safetensors", tensors)
    shape = {"model": dataclasses.asdict(model.params), "items": model.items}
    write_json(folder / "model.json", {**shape, **card, **shape})


def load_model(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The full-precision model in `folder` and its card."""
    tensors, _ = load_tensors(folder / "model.safetensors")
    card = read_json(folder / "model.json")
    return registry.of_state(from_mapping(ModelParams, card["model"], "model"), card["items"], tensors), card


def contents(folder: Path) -> str:
    """The sha256 of the names and contents of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(*parts: Any) -> str:
    """A short name for everything a run depends on, the loaded code of this package and the version of torch included: a
    resume file is only ever taken up by the same run."""
    loaded = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    own = ("sasrec", "stages", "__main__")  # the last is the stage that runs
    code = {name: sha256(file) for name, file in loaded.items() if file and name.split(".")[0] in own and Path(file).is_file()}
    text = json.dumps([parts, code, torch.__version__], sort_keys=True, default=lambda value: dataclasses.asdict(value))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def flatten(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a nested state dict into its tensors and the rest, both keyed by path (for optimizer states)."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            inner_tensors, inner_rest = flatten(value, name + "/")
            tensors |= inner_tensors
            rest |= inner_rest
        else:
            rest[name] = value
    return tensors, rest


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state per parameter, by '<parameter number>/<name>'."""
    return flatten(optimizer.state_dict()["state"])[0]


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; learning rates are set by the schedule at every step."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        number, name = path.split("/")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
