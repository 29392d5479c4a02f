"""Draw images from a trained model.

The ending of --out says what is written: .png a grid, .npz the uint8 images [N, H, W, C] and
their labels, and with --trajectory a .gif, .png or .webp of the predicted images, step by step.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from .. import images
from ..data.npz import npz_writer
from ..draw import draw_batches
from ..models import UNet
from . import sampling

PICTURES = (".png", ".gif", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sampling.add_arguments(parser)
    add = parser.add_argument
    add("--guidance", type=float,
        help="weight w (default 0: plain conditional; of a student its own)")  # fmt: skip
    add("--class", dest="classes", action="append", metavar="C",
        help="a class by name or number; may be repeated (default: all in turn)")  # fmt: skip
    add("--num", type=int, help="images (default: ten a class, 100 without classes)")
    add("--batch", type=int, default=100, help="images at a time (default 100)")
    add("--out", type=Path, default=Path("samples.png"))
    add("--scale", type=int, default=2, help="screen pixels a pixel in pictures (default 2)")
    add("--trajectory", action="store_true", help="animate the predicted images")


def run(args: argparse.Namespace) -> int:
    wanted = PICTURES if args.trajectory else (".png", ".npz")
    if args.out.suffix not in wanted:
        raise ValueError(f"--out={args.out}: must end in {' or '.join(wanted)}")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out={args.out}: the folder {args.out.parent} does not exist; make it")
    for name in ("num", "batch", "scale"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1")
    model = sampling.model_of(args)
    labels = _labels(args, model)
    sampler = sampling.sampler_of(args, model)
    network, guidance = sampling.network_at(args, model, args.guidance)
    start, config = time.perf_counter(), model.config
    frames: list[list[torch.Tensor]] | None = [] if args.trajectory else None
    batches = draw_batches(
        network,
        sampler,
        (config.in_channels, config.image_size, config.image_size),
        len(labels),
        labels if config.num_classes else None,
        guidance,
        args.seed,
        args.batch,
        device=args.device,
        progress=sys.stderr.isatty(),
        frames=frames,
    )
    if args.out.suffix == ".npz":
        shape = len(labels), config.image_size, config.image_size, config.in_channels
        with npz_writer(args.out, shape, labels) as add:
            for x in batches:
                add(x)
    else:
        _draw(args, torch.cat(list(batches)), labels, frames)
    seconds = time.perf_counter() - start
    print(
        f"{len(labels)} images of {args.model} in {seconds:.1f} s ({len(labels) / seconds:.1f} "
        f"images/s, {len(sampler.table)} steps, {torch.get_num_threads()} threads): {args.out}"
    )
    return 0


def _labels(args: argparse.Namespace, model: UNet) -> torch.Tensor:
    """One label an image, the chosen classes in turn; zeros for a model without classes."""
    classes = model.config.num_classes
    if classes is None:
        if args.classes or args.guidance:
            raise ValueError(f"--class, --guidance: {args.model} has no classes; leave them out")
        return torch.zeros(args.num or 100, dtype=torch.int64)
    names = {name.lower(): k for k, name in enumerate(model.class_names)}
    chosen = [
        names.get(c.lower(), int(c) if c.isdigit() else -1)
        for c in args.classes or map(str, range(classes))
    ]
    if not all(0 <= c < classes for c in chosen):
        takes = ", ".join(model.class_names) or "names"
        raise ValueError(f"--class={args.classes}: must be 0 to {classes - 1} or one of {takes}")
    num = args.num or 10 * len(chosen)
    return torch.tensor(chosen).repeat(num // len(chosen) + 1)[:num]


def _draw(
    args: argparse.Namespace,
    x: torch.Tensor,
    labels: torch.Tensor,
    frames: list[list[torch.Tensor]] | None,
) -> None:
    columns = len(labels.unique()) if len(labels.unique()) > 1 else None
    if frames:
        rows = [torch.cat(parts) for parts in zip(*frames, strict=True)]
        pictures = [images.grid(row, columns, scale=args.scale) for row in rows]
        images.save_animation(pictures, args.out)
    else:
        images.grid(x, columns, scale=args.scale).save(args.out)
