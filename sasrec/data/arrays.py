"""Arrays written so that a full disk is reported as one."""

from pathlib import Path
from typing import Any

import numpy as np


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write `array` as .npy. Not np.save: on a full disk that raises an OSError without an error number."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)
