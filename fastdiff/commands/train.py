"""Train a model from a recipe.

A recipe is a JSON file of four parts: "model" (UNetConfig's fields), "schedule" (a
constructor of NoiseSchedule), "data" (a reader and its arguments) and "train" (TrainConfig's
fields). Flags override the last. Ctrl-C or SIGTERM saves and stops; --resume continues.

On several GPUs or processes: torchrun --nproc-per-node 8 -m fastdiff train ...
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..data import READERS
from ..errors import one_of
from ..models import UNet, UNetConfig
from ..schedule import NoiseSchedule
from ..train import TrainConfig, Trainer
from ..train.distributed import LostWorker, processes

_PARTS = ("model", "schedule", "data", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="the recipe, a JSON file")
    parser.add_argument("--data", type=Path, help="where the data is; else the reader's default")
    parser.add_argument("--out", required=True, type=Path, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # the flags say what TrainConfig's docstring says
    said = dict(re.findall(r"^ +(\w+): ((?:.|\n {9,})+)", TrainConfig.__doc__ or "", re.MULTILINE))
    flags = parser.add_argument_group("instead of the recipe's")
    for field in fields(TrainConfig):
        kind: dict[str, Any] = {"type": type(field.default)}
        if kind["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif "tuple" in str(field.type):
            kind["nargs"] = "+"
        flags.add_argument(
            "--" + field.name.replace("_", "-"),
            default=None,
            help=" ".join(said.get(field.name, "").split()).replace("%", "%%"),
            **kind,
        )


def run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.config)
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    overrides = {name: value for name, value in given.items() if value is not None}
    config = TrainConfig.from_json({**recipe["train"], **overrides})
    options = dict(recipe["data"])
    reader = options.pop("name", None)
    one_of(f"{args.config}: data name", reader, READERS)
    source = () if args.data is None else (args.data,)
    try:
        inspect.signature(READERS[reader]).bind(*source, **options)
    except TypeError as error:
        raise ValueError(f"{args.config}: data {reader!r}: {error}") from None
    data = READERS[reader](*source, **options)
    schedule = NoiseSchedule.from_json(recipe["schedule"])
    with processes(args.device) as device:
        torch.manual_seed(config.seed)
        model = UNet(UNetConfig.from_json(recipe["model"])).to(device)
        trainer = Trainer(model, schedule, data, config, args.out)
        try:
            trainer.fit(resume=args.resume)
        except (FloatingPointError, ImportError, LostWorker) as error:
            raise ValueError(str(error)) from None
    done = trainer.step == config.steps
    if trainer.leads:
        print(f"{'finished' if done else 'stopped'} at step {trainer.step}: {args.out}")
    return 0 if done else 130


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    """The four parts of a recipe; errors name the file and what is wrong in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        recipe = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(recipe, dict) or sorted(recipe) != sorted(_PARTS):
        got = sorted(recipe) if isinstance(recipe, dict) else type(recipe).__name__
        raise ValueError(f"{path}: has {got}; must have the parts {list(_PARTS)}")
    return recipe
