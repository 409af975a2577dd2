"""The runtime of an exported model: original item ids in, recommendations out. Needs numpy and onnxruntime, nothing else.

This file is copied into every exported folder, which therefore works alone:

    from recommender import Recommender
    model = Recommender.load("data/exported/lsq/0")
    model.recommend(["1193", "661", "914"], k=10)
    model.recommend(["1193", "661", "914"], ratings=[5, None, 3], times=[978300760, 978302109, 978301968])

Ratings and times help where the model was trained with them (`model.inputs`); it ignores them where it was not.

or, in a shell, `python recommender.py --history 1193,661,914`.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

FORMAT = 4
# onnxruntime is fastest on batches of this size: their activations stay in the cache.
CHUNK = 32
# How many items a cheap product proposes for an exact one, at least, and how many the exact one takes at once.
SHORTLIST, RESCORED = 256, 65_536
NIBBLES = "nibbles"

Array = NDArray[Any]

# What may be known of each event, and as what the encoder takes it; nan where it is not known.
KNOWN = {"ratings": np.float32, "times": np.float64}
# Seconds that a float64 holds exactly, with their differences.
LATEST = 2**52
# One id on the command line: in double quotes, or up to the next comma.
LISTED = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^\s",][^,]*)?)\s*(?:,|\Z)')


class ArtefactError(Exception):
    """A folder that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Item:
    """id: the original one. score: higher is better; of a recommendation by popularity, the item's training interactions."""

    id: str
    title: str
    categories: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class Recommendation:
    """items: best first, ties by the lower internal id; fewer than asked for where no more are left. unknown: ids of the
    history that the model does not know, and that were ignored; unknown_allow, unknown_block: the same of
    what is allowed and blocked. by_popularity: whether no known id was left; nothing_allowed: whether none was in allow."""

    items: tuple[Item, ...]
    unknown: int
    by_popularity: bool
    unknown_allow: int = 0
    unknown_block: int = 0
    nothing_allowed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON; dataclasses.asdict takes three times as long, as long as scoring."""
        items = [{"id": i.id, "title": i.title, "categories": i.categories, "score": i.score} for i in self.items]
        return {
            "items": items,
            "unknown": self.unknown,
            "by_popularity": self.by_popularity,
            "unknown_allow": self.unknown_allow,
            "unknown_block": self.unknown_block,
            "nothing_allowed": self.nothing_allowed,
        }


def digest(manifest: dict[str, Any]) -> str:
    """What the manifest says of itself under `digest`: the sha256 of the rest of it."""
    content = json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def unpack(stream: NDArray[np.uint8], bits: int, shape: Sequence[int]) -> NDArray[np.uint8]:
    """Codes from a stream of bits, least significant bit first: code i is in the bits from i * bits on.

    Raises ValueError where the stream's length does not fit the shape.
    """
    count = int(np.prod(shape))
    if len(stream) != -(-count * bits // 8):
        raise ValueError(f"{len(stream)} bytes do not hold {count} codes of {bits} bits")
    if bits == 8:
        return stream.reshape(shape)
    codes = np.empty(-(-count // 8) * 8, np.uint8)
    if bits in (1, 2, 4):
        mask, parts = (1 << bits) - 1, 8 // bits
        for part in range(parts):
            own = codes[part::parts]
            own[: len(stream)] = stream[: len(own)] >> (part * bits) & mask
        return codes[:count].reshape(shape)
    at_once = 1 << 20  # a bit takes a byte meanwhile
    for start in range(0, count, at_once):
        stop = min(start + at_once, count)
        own = np.unpackbits(stream[start * bits // 8 : -(-stop * bits // 8)], count=(stop - start) * bits, bitorder="little")
        codes[start:stop] = np.packbits(own.reshape(-1, bits), axis=1, bitorder="little")[:, 0]
    return codes[:count].reshape(shape)


def block_size(features: int) -> int:
    """Elements that share a scale in a product by 4-bit blocks: as many as divide a row, a power of two from 16 to 256."""
    return min(256, features & -features)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as it describes them. Raises ArtefactError."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}); name a folder that `dvc repro` exported") from None
    except ValueError:
        raise ArtefactError(f"{path} is not valid JSON; export the model again with `dvc repro`") from None
    if not isinstance(manifest, dict) or "format" not in manifest or not isinstance(manifest.get("files"), dict):
        raise ArtefactError(f"{path} is not the manifest of an exported model")
    if manifest["format"] != FORMAT:
        raise ArtefactError(
            f"{path} is of format {manifest['format']}, and this runtime reads {FORMAT}; use the recommender.py beside it, "
            "or export the model again with `dvc repro`"
        )
    if manifest.get("digest") != digest(manifest):
        raise ArtefactError(f"{path} was changed after the export; export the model again with `dvc repro`")
    for name, facts in manifest["files"].items():
        file = folder / name
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ArtefactError(f"{path} does not say what {name} is; export the model again with `dvc repro`")
        if os.path.basename(name) != name or not file.is_file():
            raise ArtefactError(f"{file} is missing; copy the whole folder again")
        if file.stat().st_size != facts["bytes"]:
            raise ArtefactError(f"{file} has {file.stat().st_size} bytes, not {facts['bytes']}; copy the whole folder again")
        with open(file, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != facts["sha256"]:
                raise ArtefactError(f"{file} is not the file its manifest describes; copy the whole folder again")
    return manifest


class Tensors:
    """The packed tensors of a folder, unpacked once."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.entries = folder, manifest["tensors"]
        self.levels = {key: np.array(values) for key, values in manifest["levels"].items()}
        self._kept: dict[str, Array] = {}

    def _bytes(self, place: dict[str, Any], dtype: str) -> Array:
        size = np.dtype(dtype).itemsize
        return np.memmap(self.folder / place["file"], dtype, "r", place["offset"], (place["bytes"] // size,))

    def stored(self, name: str) -> Array:
        """As products take it: int8 integers, codes (uint8) of levels beyond int8, or float32."""
        if name not in self._kept:
            entry = self.entries[name]
            shape, dtype = entry["unpacked"]["shape"], entry["unpacked"]["dtype"]
            array: Array
            if dtype.startswith("float"):
                array = self._bytes(entry, f"<f{entry['bits'] // 8}").reshape(shape).astype(np.float32, copy=False)
            else:
                array = self._product(entry) if "product" in entry else unpack(self._bytes(entry, "u1"), entry["bits"], shape)
                if dtype == "int8":
                    array = self.levels[entry["unpacked"]["integers"]].astype(np.int8)[array]
            self._kept[name] = np.ascontiguousarray(array)
        return self._kept[name]

    def _product(self, entry: dict[str, Any]) -> NDArray[np.uint8]:
        """The codes of a table by product quantization, (rows, features): each item the centroids that it has in each split,
        padding the code of 0."""
        parts = entry["product"]
        numbers, book = (
            unpack(self._bytes(parts[part], "u1"), parts[part]["bits"], parts[part]["shape"]) for part in ("numbers", "book")
        )
        codes = np.full(entry["shape"], parts["zero"], np.uint8)
        for split, part in enumerate(np.split(codes, len(book), axis=1)):
            part[1:] = book[split, numbers[:, split]]
        return codes

    def _parameter(self, name: str, part: str) -> Array:
        """A scale or shift of the stored levels: float32 (rows, 1) or (1, 1)."""
        place = self.entries[name].get(part)
        if place is None:
            return np.zeros((1, 1), np.float32)
        if "value" in place:
            return np.full((1, 1), place["value"], np.float32)
        half = self._bytes(place, "<f2").astype(np.float32)
        return (half * np.float32(place["unit"]))[:, None]

    def part(self, name: str, part: str) -> Array:
        """The scale or the shift of the stored integers, (rows, 1) float32."""
        entry = self.entries[name]
        result = self._parameter(name, part)
        if part == "shift" and "integers" in entry["unpacked"]:
            # The levels may have been moved to fit int8.
            moved = self.levels[entry["levels_list"]][0] - self.levels[entry["unpacked"]["integers"]][0]
            result = result + np.float32(moved) * self._parameter(name, "scale")
        return np.broadcast_to(result, (entry["shape"][0], 1))

    def nibbles(self, name: str) -> NDArray[np.uint8]:
        """A table of integers from -8 to 7 as onnxruntime takes 4 bits: (rows, blocks, block / 2), each plus 8, the earlier
        one in the lower half of a byte."""
        table = self.stored(name)
        rows, features = table.shape
        result = np.empty((rows, features // 2), np.uint8)
        for at in range(0, rows, RESCORED):
            part = (table[at : at + RESCORED] + 8).view(np.uint8)
            result[at : at + RESCORED] = part[:, 0::2] | part[:, 1::2] << 4
        return result.reshape(rows, features // block_size(features), -1)

    def initializer(self, name: str, scoring: str) -> Array:
        """What a graph asks for by name. scoring: the table that items are scored with, (rows, features), which the product
        takes turned over, as integers wherever it is quantized."""
        place, _, part = name.partition("/")
        if place != "scoring_table":
            return self.stored(name) if not part else np.ascontiguousarray(self.part(place, part))
        if part == NIBBLES:
            return self.nibbles(scoring)
        if part == "block_scales":
            features = self.entries[scoring]["shape"][1]
            return np.repeat(self.part(scoring, "scale")[:, 0], features // block_size(features))
        if part:
            return np.ascontiguousarray(self.part(scoring, part)[:, 0])
        table = self.stored(scoring)
        if table.dtype == np.uint8:
            table = self.levels[self.entries[scoring]["levels_list"]].astype(np.float32)[table]
        return np.ascontiguousarray(table.T)


class Recommender:
    """A loaded model; all methods may be called from several threads at once. Made by `load`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int) -> None:
        self.folder, self.manifest, self.threads = folder, manifest, threads
        self.items_count, self.max_len = int(manifest["items"]), int(manifest["model"]["max_len"])
        self._arrays: list[Array] = []
        tensors = Tensors(folder, manifest)
        self._encoder = self._session("encoder.onnx", tensors)
        # What the encoder takes of each event beside the item.
        self.inputs = tuple(given.name for given in self._encoder.get_inputs() if given.name in KNOWN)
        self._lazy: dict[str, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()
        self.shortlist: dict[str, Any] | None = manifest.get("shortlist")
        # Of the requests that were answered by way of a shortlist, those whose shortlist had to be widened.
        self.shortlisted = self.widened = 0
        if self.shortlist is None:
            self._exact("top_k.onnx", tensors)
        else:
            self._candidates = self._session("shortlist.onnx", tensors)
            table = manifest["scoring_table"]
            self._rows = tensors.stored(table)
            self._row_scales = np.float32(self.shortlist["state_scale"]) * tensors.part(table, "scale")[:, 0]
        self._read_items()

    @classmethod
    def load(cls, path: str | os.PathLike[str], threads: int = 1) -> "Recommender":
        """The model of an exported folder. threads: how many a product may use. Raises ArtefactError where a file is missing,
        was changed after the export, or is of another version."""
        folder = Path(path)
        manifest = read_manifest(folder)
        try:
            model = cls(folder, manifest, threads)
            # What would fail at the first request fails here; and what is done once is done.
            model.recommend(model.ids[1:2])
            model.shortlisted = model.widened = 0
            return model
        except ArtefactError:
            raise
        except Exception as error:  # of whatever kind: the hashes are right, what they cover is not
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ArtefactError(
                f"{folder / 'manifest.json'} does not describe the files beside it ({reason}); export the model again with "
                "`dvc repro`"
            ) from None

    def _session(self, file: str, tensors: Tensors) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # Threads that wait for work by spinning take the cores from whatever else runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Processors before VNNI add two products of 8 bits in 16, which 127 times 255 twice does not fit; on those, and no
        # others, this has onnxruntime take a slower product that is exact.
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 3
        names = self.manifest["given"][file]
        arrays = [tensors.initializer(name, self.manifest["scoring_table"]) for name in names]
        if names:
            self._arrays += arrays  # the session uses their memory
            options.add_external_initializers(names, [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays])
        content = (self.folder / file).read_bytes()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def _exact(self, file: str, tensors: Tensors | None = None) -> onnxruntime.InferenceSession:
        """The session of a file that not everyone needs, made when it is first asked for: it holds a table of its own."""
        with self._lock:
            if file not in self._lazy:
                self._lazy[file] = self._session(file, tensors or Tensors(self.folder, self.manifest))
            return self._lazy[file]

    def _read_items(self) -> None:
        with open(self.folder / "items.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        if len(rows) != self.items_count:
            raise ArtefactError(f"{self.folder / 'items.csv'} has {len(rows)} items, and the model {self.items_count}")
        self.ids = ["", *(row[1] for row in rows)]  # by internal id; 0 is padding
        self.titles = ["", *(row[2] for row in rows)]
        self.categories = [(), *(parted(row[3]) for row in rows)]
        self.counts = np.array([0, *(int(row[4]) for row in rows)], np.int64)
        self._internal = {original: i for i, original in enumerate(self.ids) if i}
        self._popular = np.lexsort((np.arange(1, self.items_count + 1), -self.counts[1:])) + 1

    # What a caller asks for

    def recommend(
        self,
        history: Sequence[Any],
        k: int = 10,
        exclude_seen: bool = True,
        allow: Iterable[Any] | None = None,
        block: Iterable[Any] | None = None,
        ratings: Sequence[Any] | None = None,
        times: Sequence[Any] | None = None,
    ) -> Any:
        """The k best next items after a history of original item ids, oldest first.

        history: ids (text or whole numbers) of one user, which gives a Recommendation; or a list of such lists, which gives a
        list of them. exclude_seen: leave out the items of the history. allow: recommend from these only; block: never
        recommend these; ids that the model does not know are ignored and counted. ratings, times: of the events of the
        history, as long as it is (for a list of histories, a list of such lists), None for what is not known: numbers, of
        times the seconds since 1970, none before the one before it. Raises ValueError or TypeError on other input.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"k must be a whole number from 1 on, not {k!r}")
        if isinstance(history, str | bytes) or not isinstance(history, Sequence | np.ndarray):
            raise TypeError("history must be a list of item ids, or a list of such lists")
        many = len(history) > 0 and isinstance(history[0], Sequence | np.ndarray) and not isinstance(history[0], str | bytes)
        found = [self.internal(one) for one in (history if many else [history])]
        known_of = self._known(history if many else [history], {"ratings": ratings, "times": times}, many)
        among, unknown_allow = (None, 0) if allow is None else self.internal(allow)
        allowed = None if among is None else np.unique(among)
        blocked, unknown_block = self.internal([] if block is None else block)
        of_lists = (unknown_allow, unknown_block, allowed is not None and len(allowed) == 0)
        # Of like length together, because a batch is as long as its longest history.
        order = sorted(range(len(found)), key=lambda i: len(found[i][0]))
        results: list[Recommendation | None] = [None] * len(found)
        known = [i for i in order if len(found[i][0])]
        for i in order[: len(order) - len(known)]:
            items = self._by_popularity(int(k), allowed, blocked)
            results[i] = Recommendation(items, found[i][1], True, *of_lists)
        for at in range(0, len(known), CHUNK):
            rows = known[at : at + CHUNK]
            histories = [found[i][0] for i in rows]
            hidden = [np.concatenate([ids, blocked]) if exclude_seen else blocked for ids in histories]
            events = {name: [values[i] for i in rows] for name, values in known_of.items()}
            for i, items in zip(rows, self._best(histories, events, int(k), hidden, allowed), strict=True):
                results[i] = Recommendation(items, found[i][1], False, *of_lists)
        return results if many else results[0]

    def internal(self, ids: Iterable[Any]) -> tuple[NDArray[np.int64], int]:
        """The internal ids of the known ones among original ids, in their order, and how many are unknown."""
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise TypeError("item ids must come as a list")
        names = []
        for one in ids:
            if isinstance(one, bool) or not isinstance(one, str | int | np.integer):
                raise TypeError(f"an item id is text or a whole number, not {one!r}")
            names.append(str(one))
        known = [self._internal[name] for name in names if name in self._internal]
        return np.array(known, np.int64), len(names) - len(known)

    def _known(self, histories: Sequence[Any], given: dict[str, Any], many: bool) -> dict[str, list[Array]]:
        """What is given of the events of the known items of each history, by name; all of it is checked."""
        result: dict[str, list[Array]] = {}
        for name, values in given.items():
            if values is None:
                continue
            if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
                raise TypeError(f"{name} must be a list of numbers as long as the history")
            lists = values if many else [values]
            if len(lists) != len(histories):
                raise ValueError(f"{name} has {len(lists)} lists for {len(histories)} histories")
            result[name] = []
            for history, own in zip(histories, lists, strict=True):
                kept = [str(one) in self._internal for one in history]
                result[name].append(numbers(name, own, len(kept))[kept])
        return result

    def _item(self, internal: int, score: float) -> Item:
        return Item(self.ids[internal], self.titles[internal], self.categories[internal], score)

    def _by_popularity(self, k: int, allowed: Array | None, blocked: Array) -> tuple[Item, ...]:
        keep = ~np.isin(self._popular, blocked)
        if allowed is not None:
            keep &= np.isin(self._popular, allowed)
        return tuple(self._item(i, float(self.counts[i])) for i in self._popular[keep][:k])

    def _best(
        self, histories: list[Array], events: dict[str, list[Array]], k: int, hidden: list[Array], allowed: Array | None
    ) -> list[tuple[Item, ...]]:
        known = {name: self.padded(values, np.nan) for name, values in events.items()}
        state = self.encode(self.padded(histories), **known)
        if allowed is None:
            values, items = self.top_k(state, k, hidden)
        else:
            values = self.scores_of(state)[:, allowed]
            for row, ids in zip(values, hidden, strict=True):
                row[np.isin(allowed, ids)] = -np.inf
            best = np.argsort(-values, axis=1, kind="stable")[:, :k]
            values, items = np.take_along_axis(values, best, 1), allowed[best]
        return [
            tuple(self._item(int(i), float(v)) for i, v in zip(ids, own, strict=True) if v > -np.inf)
            for ids, own in zip(items, values, strict=True)
        ]

    # The parts, on internal ids

    def padded(self, histories: Sequence[Array], fill: float = 0) -> Array:
        """The ends of histories of internal ids, or of what is known of each event, (batch, length), padded on the left."""
        length = min(self.max_len, max(len(ids) for ids in histories))
        result = np.full((len(histories), length), fill, histories[0].dtype)
        for row, ids in zip(result, histories, strict=True):
            row[max(0, length - len(ids)) :] = ids[-length:]
        return result

    def encode(self, histories: NDArray[np.int64], ratings: Array | None = None, times: Array | None = None) -> Array:
        """(batch, length) internal ids, at least one of them in each row, to the states (batch, 1, hidden): uint8 codes;
        float32 levels where those need more bits; float32 values where the final activation is not quantized.

        ratings, times: of the same shape, nan where unknown, times in whole seconds; None where none is known. What the
        model does not take is ignored."""
        given = {"ratings": ratings, "times": times}
        known = {
            name: np.full(histories.shape, np.nan, KNOWN[name]) if given[name] is None else np.asarray(given[name], KNOWN[name])
            for name in self.inputs
        }
        return self._encoder.run(None, {"items": histories, **known})[0]

    def top_k(self, state: Array, k: int, hidden: Sequence[Array]) -> tuple[Array, Array]:
        """Scores and internal ids of the k best, (batch, k) each, ties by the lower id; -inf where fewer are left. hidden:
        what not to recommend, by row."""
        k = min(k, self.items_count)
        if self.shortlist is not None and len(state) == 1:
            values, items = self._by_shortlist(state, k, hidden[0], self.shortlist)
            return values[None], items[None]
        return self._ranked(self._exact("top_k.onnx"), state, k, hidden)

    @staticmethod
    def _ranked(session: onnxruntime.InferenceSession, state: Array, k: int, hidden: Sequence[Array]) -> tuple[Array, Array]:
        pairs = np.zeros((sum(len(ids) + 1 for ids in hidden), 2), np.int64)  # (row, item); padding is item 0
        at = 0
        for row, ids in enumerate(hidden):
            end = at + 1 + len(ids)
            pairs[at:end, 0], pairs[at + 1 : end, 1] = row, ids
            at = end
        values, items = session.run(None, {"state": state, "hidden": pairs, "k": np.array([k], np.int64)})
        return values, items

    def _by_shortlist(self, state: Array, k: int, hidden: Array, facts: dict[str, Any]) -> tuple[Array, Array]:
        """The k best for one state (1, 1, features): candidates by the cheap product, scored exactly; more candidates until
        none that is left out can be among the best."""
        levels = state[0, 0].astype(np.float32) - facts["state_zero"]
        # How far a cheap score is off at most; 1 % for the roundings of its sums in floating point.
        error = float(np.abs(levels).max()) / 254 * facts["bound"] * 1.01
        width, rows = max(int(facts["width"]), 4 * k), len(self._row_scales)
        widened = False
        while True:
            width = min(width, rows)
            cheap, items = (part[0] for part in self._ranked(self._candidates, state, width, [hidden]))
            values = self._scored(levels, items)
            values[cheap == -np.inf] = -np.inf
            best = np.lexsort((items, -values))[:k]
            limit = (float(cheap[-1]) + error) * facts["state_scale"]
            if width == rows or cheap[-1] == -np.inf or float(values[best[-1]]) > limit:
                break
            width, widened = 8 * width, True
        with self._lock:
            self.shortlisted += 1
            self.widened += widened
        return values[best], items[best]

    def _scored(self, levels: Array, items: Array) -> NDArray[np.float32]:
        """Exact scores of some items for the levels of one state: sums of integers, which float32 holds up to 2^24."""
        parts = [items[at : at + RESCORED] for at in range(0, len(items), RESCORED)]
        sums = np.concatenate([self._rows[part].astype(np.float32) @ levels for part in parts])
        return sums * self._row_scales[items]

    def scores_of(self, state: Array) -> NDArray[np.float32]:
        """Scores of all items, (batch, items + 1), by internal id; that of padding, in column 0, means nothing."""
        return self._exact("scores.onnx").run(None, {"state": state})[0]

    def scores(
        self, histories: NDArray[np.int64], ratings: Array | None = None, times: Array | None = None
    ) -> NDArray[np.float32]:
        """Scores of all items for (batch, length) internal ids, and what is known of their events as for `encode`: (batch,
        items + 1)."""
        parts = []
        for at in range(0, len(histories), CHUNK):
            own = (None if part is None else part[at : at + CHUNK] for part in (ratings, times))
            parts.append(self.scores_of(self.encode(histories[at : at + CHUNK], *own)))
        return np.concatenate(parts)


def numbers(name: str, values: Any, length: int) -> Array:
    """Ratings or times of a history of `length` events as float64, nan for None; times in whole seconds. Raises TypeError or
    ValueError where they are not such."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(f"{name} must be a list of numbers as long as the history")
    if len(values) != length:
        raise ValueError(f"{name} has {len(values)} entries for a history of {length}")
    result = np.full(length, np.nan)
    for i, value in enumerate(values):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"{name}[{i}] must be a number or null, not {value!r}")
        # Compared before it is made a float, which a number of many digits cannot be.
        if not -LATEST < value < LATEST:
            raise ValueError(f"{name}[{i}] must be a number of usual size, not {str(value)[:30]}")
        result[i] = value
    if name == "times":
        result = np.floor(result)
        given = result[~np.isnan(result)]
        if (np.diff(given) < 0).any():
            raise ValueError("times must not fall: the history is oldest first")
    return result


def listed(option: str, text: str) -> list[str]:
    """The ids that an option names, as a line of CSV. Spaces around an id do not count, those within its quotes do.

    Not csv.reader: that does not tell which spaces were in quotes. Raises ValueError where quotes do not fit."""
    ids, at = [], 0
    while at < len(text):
        found = LISTED.match(text, at)
        if found is None:
            raise ValueError(
                f"--{option}: the double quotes at {text[at:].strip()[:30]} do not end at a comma; an id with a comma is "
                'written "a,b", and one that begins with a double quote """a"'
            )
        quoted, plain = found.groups()
        if quoted is not None:
            ids.append(quoted.replace('""', '"'))
        elif plain:
            ids.append(plain.strip())
        at = found.end()
    return ids


def parted(text: str) -> tuple[str, ...]:
    """The categories in a field of items.csv: with `|` between; one in a name is written `\\|`, and a backslash twice."""
    names = re.findall(r"(?:[^\\|]|\\.)+", text, re.DOTALL)
    return tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names)


def table(result: Recommendation) -> str:
    """A recommendation as lines for a terminal."""
    wide = max([len("item"), *(len(item.id) for item in result.items)])
    lines = [f"{'':>4}  {'item':<{wide}}  {'score':>9}  title"]
    for place, item in enumerate(result.items, 1):
        title = item.title + (f" ({', '.join(item.categories)})" if item.categories else "")
        lines.append(f"{place:>4}  {item.id:<{wide}}  {item.score:>9.4f}  {title}".rstrip())
    unknown = {"the history": result.unknown, "--allow": result.unknown_allow, "--block": result.unknown_block}
    lines += [f"ignored {count} of {where} that the model does not know" for where, count in unknown.items() if count]
    if result.nothing_allowed:
        lines.append("no known item in --allow: nothing can be recommended")
    elif result.by_popularity:
        lines.append("no known item in the history: these are the most popular; the score counts interactions")
    return "\n".join(lines)


def main(arguments: Sequence[str], prog: str, folder: str | None = None) -> int:
    """The command line. folder: the model where --model is not given; None: it must be."""
    commas = """separated by commas; one with a comma or outer spaces in double quotes: '"a,b",c'"""
    parser = argparse.ArgumentParser(prog=prog, description="Recommend items after a history.")
    parser.add_argument("--model", default=folder, required=folder is None, help="folder of an exported model")
    parser.add_argument("--history", default="", help=f"original item ids, oldest first, {commas}")
    parser.add_argument("--ratings", help="of the history's items, separated by commas, nothing where unknown: 5,,3")
    parser.add_argument("--times", help="of the history's events, in seconds since 1970, separated by commas")
    parser.add_argument("-k", type=int, default=10, help="how many to recommend")
    parser.add_argument("--include-seen", action="store_true", help="recommend items of the history, too")
    parser.add_argument("--allow", help=f"recommend from these ids only, {commas}")
    parser.add_argument("--block", help=f"never recommend these ids, {commas}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)

    def ids(option: str, text: str | None) -> list[str] | None:
        return None if text is None else listed(option, text)

    def values(name: str, text: str | None) -> list[float | None] | None:
        if not text:
            return None
        try:
            return [float(part) if part.strip() else None for part in text.split(",")]
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from None

    try:
        model = Recommender.load(given.model)
        result = model.recommend(
            listed("history", given.history),
            given.k,
            not given.include_seen,
            ids("allow", given.allow),
            ids("block", given.block),
            values("ratings", given.ratings),
            values("times", given.times),
        )
    except (ArtefactError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.as_dict(), ensure_ascii=False, indent=2) if given.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "recommender.py", str(Path(__file__).parent)))
