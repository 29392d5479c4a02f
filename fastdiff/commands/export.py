"""Write the samples of a folder as PNG files, 000000000.png and so on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..data.shards import export_png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of fastdiff sample --out DIR")
    parser.add_argument("--out", required=True, type=Path, help="the folder of the PNG files")


def run(args: argparse.Namespace) -> int:
    count = export_png(args.folder, args.out, sys.stderr.isatty())
    print(f"{count} images: {args.out}")
    return 0
