"""Mappings as YAML gives them to dataclasses, and the errors that say which key is wrong.

Values are converted by their declared type, because YAML readers disagree: `dvc exp run -S train.lr=5e-5` writes
`5e-05`, which PyYAML reads as a string. Unknown keys are refused with the nearest known one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from sasrec.errors import UserError

T = TypeVar("T")
FEW = 5


def unknown(what: str, name: object, known: typing.Iterable[str], where: str = "params.yaml") -> UserError:
    """The error for a name that nothing knows; names the nearest known one, and all of them where they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hints = [f"did you mean '{near[0]}'?"] if near else []
    # `gpu` is most like `cpu`: what is nearest may be what was not meant.
    if not near or len(names) <= FEW:
        hints.append(f"known: {', '.join(names) or 'none'}")
    hint = " ".join(hints)
    return UserError(f"{where}: unknown {what} '{name}'; {hint}")


def flat(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for name, value in mapping.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return result


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Convert `value` to the annotated type `kind`, or raise UserError naming `key`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)

    def wrong(wanted: str) -> UserError:
        # As YAML writes it: `None` would read like the word none, which some keys take.
        written = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        return UserError(f"params.yaml: {key} must be {wanted}, not {written}")

    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner, value, key)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            if isinstance(value, str):
                raise unknown(f"value of {key}", value, arguments)
            raise wrong("one of " + ", ".join(map(str, arguments)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong("a list")
        return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong("a mapping")
        if arguments[1] is int:
            value = flat(value)  # `-S +quant.overrides.item_table.weight=4` writes it nested
        return {str(name): _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast(type, kind), value, key)
    if kind is Any:
        return value
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if kind is str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong("text (quote it if it is a word like yes, no, on or off)")
        return str(value)
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if kind is int and not (isinstance(value, int | str) or float(value) == number):
            raise ValueError
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise wrong("a whole number" if kind is int else "a number") from None


def from_mapping(cls: type[T], mapping: Any, where: str, base: T | None = None) -> T:
    """Build the dataclass `cls` from `mapping`, the value of the key `where` in params.yaml. base: what has the values of
    the keys that are not there; None: their defaults.

    Raises UserError for an unknown or missing key, or a value of the wrong type or outside its range.
    """
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise UserError(f"params.yaml: {where} must be a mapping of keys to values, not {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    prefix = f"{where}." if where else ""
    for name in mapping:
        if name not in fields:
            raise unknown("key", f"{prefix}{name}", [f"{prefix}{known}" for known in fields])
    values = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in mapping.items()}
    missing = [
        name
        for name, f in fields.items()
        if base is None and name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"params.yaml: the key {prefix}{missing[0]} is missing")
    try:
        return cls(**values) if base is None else dataclasses.replace(typing.cast(Any, base), **values)
    except ValueError as error:
        raise UserError(f"params.yaml: {prefix}{error}") from None


def within(name: str, value: float | None, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless low <= value <= high; None passes."""
    if value is not None and not low <= value <= high:
        limit = f"between {low} and {high}" if high != float("inf") else f"at least {low}"
        raise ValueError(f"{name} must be {limit}, not {value}")
