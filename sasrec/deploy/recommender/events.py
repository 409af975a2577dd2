"""What a caller may know of each event of a history beside the item."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What it may be, and as what the encoder takes it; nan where it is not known.
KNOWN = {"ratings": np.float32, "times": np.float64}
# Magnitudes that a float64 holds exactly, with their differences; beyond it is no rating.
LARGEST = 2**52
# Of times, the year 5138: today in milliseconds is beyond it, and would make every gap a thousand times as long.
LATEST = 10**11


def numbers(name: str, values: Any, length: int) -> NDArray[np.float64]:
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
        if not -LARGEST < value < LARGEST:
            raise ValueError(f"{name}[{i}] must be a number of usual size, not {str(value)[:30]}")
        if name == "times" and value >= LATEST:
            raise ValueError(f"times[{i}] is {value}; give seconds since 1970, of which this is beyond the year 5000")
        result[i] = value
    if name == "times":
        result = np.floor(result)
        given = result[~np.isnan(result)]
        if (np.diff(given) < 0).any():
            raise ValueError("times must not fall: the history is oldest first")
    return result
