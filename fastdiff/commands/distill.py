"""Distil a model into students that take few steps.

A recipe is a JSON file of four parts: "teacher" (a shipped name, a folder or a .safetensors file),
"data" (a reader and its arguments), "distill" (DistillConfig's fields) and "train" (TrainConfig's,
for each stage). Flags override them. --out gets a folder for each stage, named by its student's
steps; `fastdiff sample --model OUT/4` draws from one. Ctrl-C or SIGTERM saves and stops; --resume
continues.

On several GPUs or processes: torchrun --nproc-per-node 8 -m fastdiff distill ...
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from ..checkpoint import load
from ..data import READERS
from ..distillation import DistillConfig, distill
from ..train import TrainConfig
from ..train.distributed import LostWorker, World, processes
from .device import add_device
from .recipe import add_flags, from_recipe, read_data, read_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="the recipe, a JSON file")
    parser.add_argument("--teacher", help="in place of the recipe's")
    parser.add_argument("--data", type=Path, help="where the data is; else the reader's default")
    parser.add_argument("--out", required=True, type=Path, help="the folder of the stages")
    parser.add_argument("--resume", action="store_true", help="continue in --out")
    add_device(parser)
    add_flags(parser, DistillConfig)
    add_flags(parser, TrainConfig)


def run(args: argparse.Namespace) -> int:
    if args.prediction is not None:
        raise ValueError(
            f"--prediction={args.prediction}: students predict as their teacher; leave it out"
        )
    recipe = read_recipe(args.config, ("teacher", "data", "distill", "train"))
    config = from_recipe(DistillConfig, recipe["distill"], args)
    train = from_recipe(TrainConfig, recipe["train"], args)
    data = read_data(recipe["data"], args.data, args.config)
    held_out = None
    if "split" in inspect.signature(READERS[recipe["data"]["name"]]).parameters:
        held_out = read_data(recipe["data"], args.data, args.config, split="test")
    elif args.report_images:
        raise ValueError(
            f"--report-images={args.report_images}: {recipe['data']['name']} has no test images "
            "to report on; leave it out"
        )
    with processes(args.device) as device:
        teacher = load(args.teacher or recipe["teacher"]).to(device)
        try:
            distill(
                teacher,
                None,
                data=data,
                out=args.out,
                train=train,
                held_out=held_out,
                resume=args.resume,
                **vars(config),
            )
        except (FloatingPointError, ImportError, LostWorker) as error:
            raise ValueError(str(error)) from None
        leads = World().rank == 0
    if leads:
        print(f"students of {', '.join(map(str, config.stages))} steps: {args.out}")
    return 0
