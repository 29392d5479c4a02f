"""python -m fastdiff.aot: compile every GPU kernel without a GPU and write the account."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from ..op import Case, Op
from ..ops import OPS
from . import TARGETS, Target, cuda, predictions, reports
from .document import page


def main() -> None:
    names = [target.name for target in TARGETS]
    ops = [op.name for op in OPS.values() if op.has_triton()]
    parser = argparse.ArgumentParser(prog="python -m fastdiff.aot", description=__doc__)
    add = parser.add_argument
    add("--target", action="append", choices=names, help="only this one; repeatable")
    add("--op", action="append", choices=ops, help="only this one; repeatable")
    add("--cuda", action="store_true", help="also what nvcc says of the CUDA C++ kernels")
    add("--out", type=Path, help="write the page here, with a picture beside it; else print it")
    add("--json", type=Path, help="also write all figures here")
    asked = parser.parse_args()
    rows = []
    for name in tqdm([name for name in ops if name in (asked.op or ops)], unit="op"):

        def select(op: Op, case: Case, target: Target, name: str = name) -> bool:
            return op.name == name and target.name in (asked.target or names)

        rows += reports(select)
    predicted = predictions(rows)
    text = page(rows, predicted, cuda.usage() if asked.cuda else ())
    if not asked.out:
        print(text)
    else:
        asked.out.write_text(text)
        if find_spec("matplotlib"):
            from .picture import draw

            draw(asked.out.with_suffix(".png"), predicted)
    if asked.json:
        told = [
            {
                "op": row.op.name,
                "kernel": row.kernel,
                "target": row.target.name,
                "cases": row.cases,
                "blocks": row.config.blocks,
                "threads": row.config.threads,
                "resident": row.resident,
                **asdict(row.code),
            }
            for row in rows
        ]
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
