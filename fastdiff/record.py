"""Frozen records that the code, the command line, the JSON files and the docs share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from .errors import is_a


class Record:
    """Base of a frozen dataclass of ints, floats, bools, strings, None and tuples of them."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            if not _fits(value := getattr(self, name), hint):
                takes = hint.__name__ if isinstance(hint, type) else hint
                raise TypeError(f"{name}={value!r}: must be {takes}")
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
                raise ValueError(f"{name}={value!r}: must be finite")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote; unknown names are refused with a ValueError."""
        is_a(cls.__name__, data, Mapping)
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if unknown := sorted(set(data) - set(known), key=str):
            raise ValueError(f"{cls.__name__}: has no fields {unknown}, takes {sorted(known)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    return type(value) in ((int, float) if hint is float else (hint,))
