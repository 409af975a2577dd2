"""Dotted keys of parameters, such as train.lr."""

from collections.abc import Mapping
from typing import Any


def of_key(params: Mapping[str, Any] | None, key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
