"""Arrays written so that a full disk is reported as one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write `array` as .npy."""
    save_parts(path, array.dtype, array.shape, [array])


def save_parts(path: Path, dtype: Any, shape: tuple[int, ...], parts: Iterable[np.ndarray[Any, Any]]) -> None:
    """Write an array of the given type and shape as .npy, whose rows come in `parts`. Not np.save: on a full disk that raises
    an OSError without an error number. Raises ValueError where the parts have another number of values."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    missing = int(np.prod(shape, dtype=np.int64))
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data)
            missing -= part.size
    if missing:
        raise ValueError(f"{path.name}: the parts do not have the {shape} values of the whole")
