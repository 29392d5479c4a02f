"""Draw images from a trained model.

The ending of --out says what is written: .png a grid, .npz the uint8 images [N, H, W, C] and
their labels, and with --trajectory a .gif, .png or .webp of the predicted images, step by step.
Without an ending it is a folder of shards, for large sets: whatever stops the command, the same one
goes on, and any number of processes may share it, each with the same images:

    torchrun --nproc-per-node 2 -m fastdiff sample -n 1000000 --out DIR

(on several machines with torchrun's rendezvous, and a folder that all see). `fastdiff verify`
checks it, `fastdiff.data.ShardedImages` reads it, `fastdiff export` makes PNGs of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import torch

from .. import images
from ..data.captions import tokenize
from ..data.npz import npz_writer
from ..data.shards import Shards
from ..draw import draw_batches
from ..job import checksum, fill
from ..models import UNet
from ..train.distributed import World, processes, several
from . import sampling

PICTURES = (".png", ".gif", ".webp")
# the first of several processes reads every shard of a set that is gone on with, the others wait
PATIENCE = timedelta(days=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sampling.add_arguments(parser)
    add = parser.add_argument
    add("--guidance", type=float,
        help="weight w (default 0: plain conditional; of a student its own)")  # fmt: skip
    add("--class", dest="classes", action="append", metavar="C",
        help="a class by name or number; may be repeated (default: all in turn)")  # fmt: skip
    add("--caption", dest="captions", action="append", metavar="TEXT",
        help="what a model of captions is told; may be repeated (default: nothing)")  # fmt: skip
    # -n: torchrun takes --num for an abbreviation of its own --numa-binding
    add("-n", "--num", type=int, help="images (default: ten a class or caption; 100 without)")
    add("--batch", type=int, default=100, help="images at a time (default 100)")
    add("--out", type=Path, default=Path("samples.png"))
    add("--per-shard", type=int, help="images of a shard of a folder (default 1000)")
    add("--scale", type=int, help="screen pixels a pixel in pictures (default 2)")
    add("--trajectory", action="store_true", help="animate the predicted images")


def run(args: argparse.Namespace) -> int:
    wanted = PICTURES if args.trajectory else (".png", ".npz", "")
    if args.out.suffix not in wanted:
        endings = " or ".join(filter(None, wanted))
        more = "" if args.trajectory else ", or be a folder's name, without an ending"
        if args.out.suffix in PICTURES:
            more += f"; {args.out.suffix} takes --trajectory"
        raise ValueError(f"--out={args.out}: must end in {endings}{more}")
    if args.out.suffix and several():
        raise ValueError(
            f"--out={args.out}: several processes fill a folder of shards; give a name without "
            "an ending"
        )
    if not args.out.parent.is_dir():
        raise ValueError(f"--out={args.out}: the folder {args.out.parent} does not exist; make it")
    if args.out.suffix and args.out.is_dir():
        raise ValueError(f"--out={args.out}: is a folder; give another name")
    if args.scale is not None and args.out.suffix not in PICTURES:
        raise ValueError(f"--scale={args.scale}: is of pictures, {args.out} is none; leave it out")
    if args.per_shard is not None and args.out.suffix:
        raise ValueError(
            f"--per-shard={args.per_shard}: is of folders, {args.out} is none; leave it out"
        )
    for name in ("num", "batch", "scale", "per_shard"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least 1")
    args.scale, args.per_shard = args.scale or 2, args.per_shard or 1000
    if not args.out.suffix:
        return _fill(args)
    model = sampling.model_of(args)
    told, num = _told(args, model)
    labels = None if told is None else told[torch.arange(num) % len(told)]
    sampler = sampling.sampler_of(args, model)
    network, guidance = sampling.network_at(args, model, args.guidance)
    start, config = time.perf_counter(), model.config
    columns = None if told is None or len(told) == 1 else len(told)
    if args.out.suffix in PICTURES:
        side = config.image_size
        try:
            images.grid_size((num, config.in_channels, side, side), columns, scale=args.scale)
        except ValueError as error:
            raise ValueError(f"--out={args.out}: {error}; give an .npz, or a folder") from None
    frames: list[list[torch.Tensor]] | None = [] if args.trajectory else None
    batches = draw_batches(
        network,
        sampler,
        (config.in_channels, config.image_size, config.image_size),
        num,
        labels,
        guidance,
        args.seed,
        args.batch,
        device=args.device,
        progress=sys.stderr.isatty(),
        frames=frames,
    )
    if args.out.suffix == ".npz":
        shape = num, config.image_size, config.image_size, config.in_channels
        written = torch.zeros(num, dtype=torch.int64) if labels is None else labels
        with npz_writer(args.out, shape, written) as add:
            for x in batches:
                add(x)
    else:
        _draw(args, torch.cat(list(batches)), columns, frames)
    seconds = time.perf_counter() - start
    print(
        f"{num} images of {args.model} in {seconds:.1f} s ({num / seconds:.1f} "
        f"images/s, {len(sampler.table)} steps, {torch.get_num_threads()} threads): {args.out}"
    )
    return 0


def _fill(args: argparse.Namespace) -> int:
    """A folder of shards, by this process or its part of several."""
    with processes(args.device, PATIENCE) as device:
        args.device = str(device)
        model = sampling.model_of(args)
        told, num = _told(args, model)
        sampler = sampling.sampler_of(args, model)
        network, guidance = sampling.network_at(args, model, args.guidance)
        config, start = model.config, time.perf_counter()
        made_of = {
            "model": args.model,
            "weights": checksum(model),
            "network": zlib.crc32(json.dumps(config.to_json(), sort_keys=True).encode()),
            "table": zlib.crc32(json.dumps(sampler.table.to_json()).encode()),
            "guidance": guidance,
            "classes": args.captions if told is None or told.ndim > 1 else told.tolist(),
            "seed": args.seed,
            "engine": args.engine if device.type == "cpu" else device.type,
            "batch": args.batch,
        }
        shape = config.in_channels, config.image_size, config.image_size
        shards = Shards(args.out, num, shape, args.per_shard, made_of)
        drawn = fill(
            shards, network, sampler, told, guidance, args.seed, args.batch, device,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
        if World().rank == 0:
            seconds = time.perf_counter() - start
            print(
                f"{num} images of {args.model}, {drawn} of them drawn now in {seconds:.1f} s "
                f"({drawn / seconds:.1f} images/s): {args.out}, {len(shards)} shards"
            )
    return 0


def _told(args: argparse.Namespace, model: UNet) -> tuple[torch.Tensor | None, int]:
    """What the network is told of images in turn, and how many images.

    Classes int64 [C], captions' tokens [C, L], or None: nothing.
    """
    classes = model.config.num_classes
    if args.captions and model.config.vocabulary is None:
        raise ValueError(f"--caption={args.captions}: {args.model} knows none; leave it out")
    if args.captions and args.classes:
        raise ValueError(f"--class={args.classes}: {args.model} is told captions; leave it out")
    if args.captions:
        told = tokenize(args.captions, model.config.text_length, model.class_names)
        return told, args.num or 10 * len(told)
    if classes is None:
        if args.classes or args.guidance:
            raise ValueError(
                f"--class, --guidance: {args.model} has no classes"
                + ("; give --caption" if model.config.vocabulary else "; leave them out")
            )
        return None, args.num or 100
    names = {name.lower(): k for k, name in enumerate(model.class_names)}
    chosen = [
        names.get(c.lower(), int(c) if c.isdecimal() else -1)
        for c in args.classes or map(str, range(classes))
    ]
    if not all(0 <= c < classes for c in chosen):
        takes = ", ".join(model.class_names) or "names"
        raise ValueError(f"--class={args.classes}: must be 0 to {classes - 1} or one of {takes}")
    return torch.tensor(chosen), args.num or 10 * len(chosen)


def _draw(
    args: argparse.Namespace,
    x: torch.Tensor,
    columns: int | None,
    frames: list[list[torch.Tensor]] | None,
) -> None:
    if frames:
        rows = [torch.cat(parts) for parts in zip(*frames, strict=True)]
        pictures = [images.grid(row, columns, scale=args.scale) for row in rows]
        images.save_animation(pictures, args.out)
    else:
        images.save_picture(images.grid(x, columns, scale=args.scale), args.out)
