"""The tensors of an exported folder, from their packed bytes to what the graphs ask for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What a graph asks for by this name is a table at 4 bits, two of them in a byte.
NIBBLES = "nibbles"

# Rows that are worked on at once.
ROWS = 65_536

Array = NDArray[Any]


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
        for at in range(0, rows, ROWS):
            part = (table[at : at + ROWS] + 8).view(np.uint8)
            result[at : at + ROWS] = part[:, 0::2] | part[:, 1::2] << 4
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
