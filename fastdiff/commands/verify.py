"""Check a folder of samples that `fastdiff sample --out DIR` wrote.

Every shard must be there, whole (its checksum is read again), of this set and in its place; and
there must be no other. The status is 1 where something is wrong; the command that drew the samples
mends it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..data.shards import MANIFEST, Shards
from ..files import read_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)


def run(args: argparse.Namespace) -> int:
    shards = Shards.open(args.folder)
    wrong = [*shards.problems(sys.stderr.isatty()).values()]
    wrong += [f"{path}: the set has no such shard" for path in shards.strangers()]
    path = args.folder / MANIFEST
    if not path.is_file():
        wrong.append(f"{path}: missing: the samples are not finished")
    elif not wrong and read_object(path) != shards.manifest():
        wrong.append(f"{path}: does not say what the shards are")
    for said in wrong:
        print(said)
    if not wrong:
        print(f"{args.folder}: {shards.num} images in {len(shards)} shards, whole")
    return 1 if wrong else 0
