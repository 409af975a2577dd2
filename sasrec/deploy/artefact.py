"""The folder that ships a model. It works alone: with numpy and onnxruntime, without this package.

encoder.onnx: item ids, and ratings and times of the events where the model asks for them, to the state after the last one.
scores.onnx, top_k.onnx: a state to the scores of all items, or to the best. item_table.bin (and output_table.bin, where items
are scored with a table of their own): packed codes, and a float16 scale per row. weights.bin: weights below 8 bits, packed;
those of 8 bits are int8 initializers of encoder.onnx. items.csv: internal id, original id, title, categories, training
interactions. recommender/: the runtime. manifest.json: what all of this is, with the sha256 of each file. Where scores are a
sum over tables, each has a .bin of its own, and NAME.rows.bin holds the row of each item in the table NAME.

A table of product quantization is stored as its centroids and the number of each item's in every split; the runtime puts it
together when it loads.

shortlist.onnx, for large tables of few bits: a state to candidates for the best (`sasrec.deploy.shortlist`).
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from sasrec import __version__
from sasrec.data.sequences import joined
from sasrec.deploy import side
from sasrec.deploy.coarse_to_fine import CoarseToFineEncoder
from sasrec.deploy.encoder import Encoder
from sasrec.deploy.graph import float_operators
from sasrec.deploy.recommender.manifest import FORMAT, digest
from sasrec.deploy.recommender.model import SHORTLIST
from sasrec.deploy.scorer import scorer
from sasrec.deploy.shortlist import FROM_ENTRIES, shortlist, suits
from sasrec.deploy.storage import Storage
from sasrec.files import atomic, csv_writer, read_json, sha256, write_json
from sasrec.models.cafe import CAFE
from sasrec.models.events import asked_by
from sasrec.models.registry import Model, facts_of
from sasrec.models.taps import taps
from sasrec.quant.frozen import FrozenTensor

RUNTIME = sorted(Path(__file__).with_name("recommender").glob("*.py"))


@dataclasses.dataclass(frozen=True)
class Item:
    """What is known of an item: its original id, its title and categories (may be empty), its training interactions."""

    original: str
    title: str = ""
    categories: tuple[str, ...] = ()
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes on disk: of everything but the items' names and the runtime, and of what the tables and the weight matrices take
    in it with their scales. bits: the mean width of the stored weights and table entries."""

    bytes: int
    embedding_bytes: int
    weight_bytes: int
    bits: float


def export(
    folder: Path,
    model: Model,
    frozen: dict[str, FrozenTensor],
    items: Sequence[Item],
    card: dict[str, Any],
    shortlist_from: int | None = None,
) -> Sizes:
    """Write the artefact of `model` into `folder`. frozen: its quantized tensors; none: it stays in full precision. items:
    those of the ids 1, 2, ...; card: what else the manifest says of the model (data, training). shortlist_from: entries of
    a table of at most 4 bits from which on single requests are answered by way of a shortlist; None: FROM_ENTRIES."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = Storage()
    encoder = encoder_of(model, frozen, storage)
    state = encoder.build()
    parts = model.scoring_parts
    contents: dict[str, bytes] = {
        "encoder.onnx": encoder.graph.serialized(
            side.inputs(asked_by(model)), {"state": (state.name, state.type, ("batch", 1, parts[-1].columns.stop))}
        )
    }
    for part in parts:
        storage.table(part.name, part.table, frozen.get(part.name))
    given = {"encoder.onnx": encoder.graph.given_names}
    for name, top_k in (("scores", False), ("top_k", True)):
        graph, content, kinds = scorer(name, state, parts, frozen, storage, top_k)
        contents[f"{name}.onnx"], given[f"{name}.onnx"] = content, graph.given_names
        for part, kind in zip(parts, kinds, strict=True):
            encoder.products["scoring" if part is parts[0] else f"scoring.{part.name}"] = kind
            storage.tensors[part.name] |= {"compute": kind, "accumulator": "int32" if kind == "int8" else "float32"}
    facts: dict[str, Any] = {}
    # A shortlist is of one table; where scores are a sum over several, all of them are read.
    stored = frozen.get(parts[0].name) if len(parts) == 1 else None
    if stored is not None and suits(state, stored, FROM_ENTRIES if shortlist_from is None else shortlist_from):
        graph, contents["shortlist.onnx"], facts["shortlist"] = shortlist(state, stored)
        given["shortlist.onnx"] = graph.given_names
        storage.tensors[parts[0].name]["single_request"] = f"4 bits shortlist {SHORTLIST}, scored again in int8"
    contents |= {name: bytes(data) for name, data in storage.files.items()}
    size = sum(map(len, contents.values()))
    contents["items.csv"] = _items_csv(items)
    contents |= {f"recommender/{file.name}": file.read_bytes() for file in RUNTIME}
    (folder / "recommender").mkdir(exist_ok=True)
    for name, content in contents.items():
        with atomic(folder / name) as temporary:
            temporary.write_bytes(content)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "onnxruntime": onnxruntime.__version__,
        "model": dataclasses.asdict(model.params),
        "items": model.items,
        "rating_edges": facts_of(model).rating_edges.tolist(),
        **card,
        "scoring_table": parts[0].name,
        "given": given,
        **facts,
        "levels": storage.levels,
        "tensors": storage.tensors,
        "activations": {name: item.grid.bits for name, item in frozen.items() if item.codes is None},
        "products": encoder.products,
        "float_operators": float_operators(contents["encoder.onnx"]),
        "sizes": dataclasses.asdict(_sizes(model, storage, size)),
        "files": {name: {"bytes": len(content), "sha256": sha256(folder / name)} for name, content in contents.items()},
    }
    write_json(folder / "manifest.json", manifest | {"digest": digest(manifest)})
    return sizes(folder)


def encoder_of(model: Model, frozen: dict[str, FrozenTensor], storage: Storage) -> Encoder | CoarseToFineEncoder:
    """What builds the graph of a model's kind."""
    return CoarseToFineEncoder(model, frozen, storage) if isinstance(model, CAFE) else Encoder(model, frozen, storage)


def _items_csv(items: Sequence[Item]) -> bytes:
    rows = [(i, item.original, item.title, joined(item.categories), item.count) for i, item in enumerate(items, 1)]
    text = io.StringIO()
    csv_writer(text).writerows([("id", "original", "title", "categories", "count"), *rows])
    return text.getvalue().encode()


def _sizes(model: Model, storage: Storage, total: int) -> Sizes:
    """total: bytes of all that counts but the manifest itself."""
    took = {"table": 0, "weight": 0}
    elements = width = 0
    for name, tap in taps(model).items():
        if tap.kind == "activation":
            continue
        count = tap.rows * tap.features
        entry = storage.tensors.get(name)
        scales = 0 if entry is None else entry["scales"]["count"] * int(entry["scales"]["dtype"][-2:]) // 8
        plain = storage.halves.get(name, 4 * count)
        took[tap.kind] += scales + (plain if entry is None else int(entry["bytes"]))
        elements += count
        width += 8 * plain if entry is None else 8 * entry["bytes"] if "product" in entry else count * int(entry["bits"])
    return Sizes(total, took["table"], took["weight"], width / elements)


def sizes(folder: Path) -> Sizes:
    """Sizes of the artefact in `folder`, its manifest included."""
    path = folder / "manifest.json"
    described = Sizes(**read_json(path)["sizes"])
    return dataclasses.replace(described, bytes=described.bytes + path.stat().st_size)
