"""Recipes: JSON files of named parts, whose records' fields are flags too."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..data import READERS, ImageSet
from ..errors import one_of
from ..record import Record

R = TypeVar("R", bound=Record)
KINDS = {"teacher": (str, "a model's name, folder or file, in quotes")}  # of other parts: objects


def read_recipe(path: Path, parts: Sequence[str]) -> dict[str, Any]:
    """The parts of a recipe; errors name the file and what is wrong in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        recipe = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(recipe, dict) or sorted(recipe) != sorted(parts):
        got = sorted(recipe) if isinstance(recipe, dict) else type(recipe).__name__
        raise ValueError(f"{path}: has {got}; must have the parts {list(parts)}")
    for name, part in recipe.items():
        kind, takes = KINDS.get(name, (dict, 'an object, {"name": value, ...}'))
        if not isinstance(part, kind):
            raise ValueError(f"{path}: {name!r} is {json.dumps(part)[:80]}, must be {takes}")
    return recipe


def read_data(part: Mapping[str, Any], source: Path | None, where: Path, **more: Any) -> ImageSet:
    """The images that a recipe's "data" part names; `source` is where they are, if given."""
    options = {**part, **more}
    reader = options.pop("name", None)
    one_of(f"{where}: data name", reader, READERS)
    place = () if source is None else (source,)
    try:
        inspect.signature(READERS[reader]).bind(*place, **options)
    except TypeError as error:
        raise ValueError(f"{where}: data {reader!r}: {error}") from None
    return READERS[reader](*place, **options)


def add_flags(parser: argparse.ArgumentParser, record: type[Record]) -> None:
    """A flag for each field of a record; it says what the record's docstring says."""
    said = dict(re.findall(r"^ +(\w+): ((?:.|\n {9,})+)", record.__doc__ or "", re.MULTILINE))
    flags = parser.add_argument_group(f"instead of the recipe's ({record.__name__})")
    for field in fields(record):  # type: ignore[arg-type]
        hint = str(field.type)
        kind: dict[str, Any] = {
            "type": next(kind for kind in (bool, int, float, str) if kind.__name__ in hint)
        }
        if kind["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif "tuple" in hint:
            kind["nargs"] = "+"
        flags.add_argument(
            "--" + field.name.replace("_", "-"),
            default=None,
            help=" ".join(said.get(field.name, "").split()).replace("%", "%%"),
            **kind,
        )


def from_recipe(record: type[R], part: Mapping[str, Any], args: argparse.Namespace) -> R:
    """The recipe's part as a record, with the flags that were given in its place."""
    given = {f.name: getattr(args, f.name) for f in fields(record)}  # type: ignore[arg-type]
    overrides = {name: value for name, value in given.items() if value is not None}
    return record.from_json({**part, **overrides})
