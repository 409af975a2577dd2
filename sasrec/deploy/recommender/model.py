"""A loaded model: histories in, recommendations out."""

import csv
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .answers import Item, Recommendation
from .events import KNOWN, numbers
from .manifest import ArtefactError, read_manifest
from .tensors import Array, Tensors

# onnxruntime is fastest on batches of this size: their activations stay in the cache.
CHUNK = 32
# How many items a cheap product proposes for an exact one, at least, and how many the exact one takes at once.
SHORTLIST, RESCORED = 256, 65_536


def parted(text: str) -> tuple[str, ...]:
    """The categories in a field of items.csv: with `|` between; one in a name is written `\\|`, and a backslash twice."""
    names = re.findall(r"(?:[^\\|]|\\.)+", text, re.DOTALL)
    return tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names)


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
