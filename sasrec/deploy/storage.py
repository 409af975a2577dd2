"""Where the tensors of an artefact lie: packed codes in files of their own, and a description of each for the manifest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sasrec.deploy.form import float_form, integer_form
from sasrec.deploy.packing import pack
from sasrec.models.taps import Table
from sasrec.quant.frozen import FrozenTensor, Product
from sasrec.quant.grid import Grid, half_parts


class Storage:
    """files: content by name. tensors: what the manifest says of each stored tensor. levels: the distinct level lists. halves:
    bytes of the tensors in full precision that are stored in 16 bits inside encoder.onnx."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        self.levels: dict[str, list[int]] = {}
        self.halves: dict[str, int] = {}

    def describe(self, name: str, kind: str, shape: tuple[int, ...], grid: Grid, compute: str) -> None:
        """Begin the entry of a quantized tensor (rows, features). compute: in what its products are (`Encoder.products`)."""
        self.tensors[name] = {
            "kind": kind,
            "shape": list(shape),
            "bits": grid.bits,
            "levels": len(grid.levels),
            "compute": compute,
            "accumulator": "int32" if compute == "int8" else "float32",
            "scales": {"dtype": "float32", "count": grid.scale.numel() + (grid.shift.numel() if bool(grid.shift.any()) else 0)},
        }

    def place_inside(self, name: str) -> None:
        """The codes are an initializer of encoder.onnx, a byte each."""
        self.tensors[name] |= {"file": "encoder.onnx", "bytes": int(np.prod(self.tensors[name]["shape"]))}

    def pack(self, file: str, name: str, codes: NDArray[np.uint8], integers: NDArray[np.int8] | None) -> None:
        """Append codes to a file at their width. integers: what the runtime unpacks them to; None: it leaves them codes."""
        entry = self.tensors[name]
        entry |= self._append(file, pack(codes, entry["bits"]).tobytes())
        self._unpacked(entry, codes.shape, integers)

    def _unpacked(self, entry: dict[str, Any], shape: tuple[int, ...], integers: NDArray[np.int8] | None) -> None:
        entry["unpacked"] = {"dtype": "uint8" if integers is None else "int8", "shape": list(shape)}
        if integers is not None:
            entry["unpacked"]["integers"] = self._listed(integers)

    def _product(
        self, file: str, name: str, shape: tuple[int, ...], grid: Grid, product: Product, integers: NDArray[np.int8] | None
    ) -> None:
        """Append what the codes of a table are put together from: which centroid of each split an item is made of, and the
        codes of the centroids. bits: what both are, an entry of the table."""
        entry = self.tensors[name]
        parts: dict[str, Any] = {"zero": Product.zero(grid)}
        for part, bits in (("numbers", max(1, (product.book.shape[1] - 1).bit_length())), ("book", grid.bits)):
            codes = getattr(product, part).cpu().numpy()
            place = self._append(file, pack(codes, bits).tobytes())
            parts[part] = {**place, "bits": bits, "shape": list(codes.shape)}
        size = parts["numbers"]["bytes"] + parts["book"]["bytes"]
        entry |= {"file": file, "bytes": size, "bits": round(8 * size / (shape[0] * shape[1]), 2), "product": parts}
        self._unpacked(entry, shape, integers)

    def _listed(self, levels: NDArray[Any]) -> str:
        """The key of a list of levels; equal lists are written once."""
        values = levels.astype(int).tolist()
        for key, known in self.levels.items():
            if known == values:
                return key
        key = str(len(self.levels))
        self.levels[key] = values
        return key

    def table(self, name: str, table: Table, stored: FrozenTensor | None) -> str:
        """Write a large table into a file of its own, once; returns the file's name."""
        file = f"{name.removesuffix('.weight')}.bin"
        if file in self.files:
            return file
        if stored is None or stored.codes is None:
            weight = float_form(table.weight)
            dtype = str(weight.dtype)
            self.tensors[name] = {
                "kind": "table",
                "shape": list(weight.shape),
                "bits": 8 * weight.dtype.itemsize,
                "compute": "float32",
                "accumulator": "float32",
                "unpacked": {"dtype": dtype, "shape": list(weight.shape)},
                "scales": {"dtype": "float32", "count": 0},
                **self._append(file, weight.astype(weight.dtype.newbyteorder("<")).tobytes()),
            }
            return file
        codes, grid = stored.codes.cpu().numpy(), stored.grid
        form = integer_form(grid)
        self.describe(name, "table", codes.shape, grid, "float32")
        integers = None if form is None else form.integers
        if stored.product is None:
            self.pack(file, name, codes, integers)
        else:
            self._product(file, name, codes.shape, grid, stored.product, integers)
        entry = self.tensors[name]
        entry["levels_list"] = self._listed(grid.levels.cpu().numpy())
        for part in ("scale", "shift"):
            parameter = getattr(grid, part).cpu()
            if part == "shift" and not bool(parameter.any()):
                continue
            entry[part] = (
                {"dtype": "float32", "value": float(parameter)} if parameter.dim() == 0 else self._half(file, parameter)
            )
        if grid.scale.dim():
            entry["scales"]["dtype"] = "float16"
        return file

    def index(self, file: str, name: str, values: NDArray[np.int32]) -> list[str]:
        """Write numbers of rows (n,) into a file, packed in as few bits as the largest needs; returns the names of the
        tensors they are, 8 bits each, the lowest first."""
        names: list[str] = []
        while not names or bool((values >> 8 * len(names)).any()):
            part = (values >> 8 * len(names)).astype(np.int64)
            bits = min(8, max(1, int(part.max()).bit_length()))
            codes = (part & 255).astype(np.uint8)
            names.append(f"{name}.{len(names)}")
            self.tensors[names[-1]] = {
                "kind": "index",
                "shape": list(codes.shape),
                "bits": bits,
                "compute": "none",
                "unpacked": {"dtype": "uint8", "shape": list(codes.shape)},
                "scales": {"dtype": "float32", "count": 0},
                **self._append(file, pack(codes, bits).tobytes()),
            }
        return names

    def _half(self, file: str, parameter: Any) -> dict[str, Any]:
        half, unit = half_parts(parameter)
        if not bool((half.float() * unit == parameter).all()):
            raise ValueError("a scale per table row is not what a float16 holds; freeze the model with sasrec.quant.attach")
        return {"dtype": "float16", "unit": unit, "rows": len(half), **self._append(file, half.numpy().astype("<f2").tobytes())}

    def _append(self, file: str, content: bytes) -> dict[str, Any]:
        """Add to a file, from a multiple of 64 bytes on, which memory-mapped arrays like."""
        data = self.files.setdefault(file, bytearray())
        data.extend(bytes(-len(data) % 64))
        place = {"file": file, "offset": len(data), "bytes": len(content)}
        data.extend(content)
        return place
