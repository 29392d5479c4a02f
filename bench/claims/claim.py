"""What a claim's script is made of: its points in a file, its table, its picture, its page."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.records import Settings, machine
from fastdiff.files import make_folder, write_bytes

DOCS = Path(__file__).parents[2] / "docs"
RUNS = Path(__file__).parents[2] / "runs" / "claims"  # networks that a script trains
# modules of this folder, in the page's order
CLAIMS: tuple[str, ...] = (
    "guidance",
    "glide",
    "strided",
    "consistency",
    "iddpm",
    "adm",
    "score_networks",
    "later",
)

Point = dict[str, Any]


class Points:
    """The measured points of a claim, in a file; until all are there, in one beside it.

    So what is measured anew, with other facts, replaces what was only when it is finished. `sets`
    is a folder for images of points that are not.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, dict(facts)
        self.unfinished = path.with_suffix(".unfinished.json")
        self.sets = path.with_suffix(".unfinished")
        self.found: dict[str, Point] = {}
        if self.unfinished.is_file():
            record = json.loads(self.unfinished.read_text())
            if record["facts"] != self.facts:
                raise SystemExit(
                    f"{self.unfinished}: holds points of {record['facts']}; remove it first"
                )
            self.found = record["points"]
        elif path.is_file() and (record := json.loads(path.read_text()))["facts"] == self.facts:
            self.found = record["points"]

    def measure(self, name: str, measured: Callable[[], Point]) -> Point:
        """The point of that name: from the file, or measured now and written there.

        "earlier" in what is measured are seconds that were spent on it before.
        """
        if name not in self.found:
            print(f"{name} ..", flush=True)
            start = time.perf_counter()
            point = measured()
            seconds = point.pop("earlier", 0.0) + time.perf_counter() - start
            self.found[name] = {**point, "seconds": round(seconds, 1)}
            self._write()
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in point.items()}
            print(f"{name}: {shown}", flush=True)
        return self.found[name]

    def finish(self) -> None:
        """Say that all are there: only then is the claim's part of the page written of them."""
        if self.unfinished.is_file():
            self.unfinished.replace(self.path)
        shutil.rmtree(self.sets, ignore_errors=True)

    def _write(self) -> None:
        """As JSON, a line a point."""
        rows = [f"{json.dumps(name)}: {json.dumps(point)}" for name, point in self.found.items()]
        head = {"facts": self.facts, "machine": machine(Settings())}
        text = json.dumps(head)[:-1] + ', "points": {\n' + ",\n".join(rows) + "\n}}\n"
        make_folder(self.path.parent)
        write_bytes(self.unfinished, text.encode())


@dataclass(frozen=True)
class Claim:
    """A claim of the literature and how it fares here.

    Attributes:
        name: of its module and its files.
        title: a line.
        says: what the literature says, with its source; a paragraph of Markdown.
        measure: measures the points: measure(points, images, seeds).
        table: the points as lines of Markdown, and what they say of the claim.
        draw: the points as a picture, or None.
        images, seeds: how many images a point has, drawn in sets of so many seeds, by default.
    """

    name: str
    title: str
    says: str
    measure: Callable[[Points, int, Sequence[int]], None]
    table: Callable[[Mapping[str, Point]], list[str]]
    draw: Callable[[Mapping[str, Point], Figure], None] | None = None
    images: int = 10_000
    seeds: int = 5

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run it as a command."""
        parser = argparse.ArgumentParser(description=f"{self.title} {self.says}")
        parser.add_argument("--images", type=int, default=self.images, help="a point")
        parser.add_argument(
            "--seeds", type=int, default=self.seeds, help="that they are drawn from"
        )
        parser.add_argument("--out", type=Path, default=DOCS, help="of results.md and results/")
        args = parser.parse_args(argv)
        facts = {"images": args.images, "seeds": args.seeds}
        points = Points(args.out / "results" / f"{self.name}.json", facts)
        self.measure(points, args.images, range(args.seeds))
        points.finish()
        if self.draw is not None:
            figure = Figure((9, 4.2), layout="constrained")
            self.draw(points.found, figure)
            figure.savefig(args.out / "results" / f"{self.name}.png", dpi=110)
        document(args.out)
        print(args.out / "results.md")
        return 0

    def section(self, out: Path) -> list[str]:
        """Its part of the page, from its file; nothing where there is none."""
        path = out / "results" / f"{self.name}.json"
        if not path.is_file():
            return []
        record = json.loads(path.read_text())
        points, facts = record["points"], record["facts"]
        threads = record["machine"]["threads"]
        minutes = sum(point["seconds"] for point in points.values()) / 60
        lines = ["", f"## {self.title}", "", self.says, ""]
        given = {"images": self.images, "seeds": self.seeds}
        odd = [f" --{key} {facts[key]}" for key, usual in given.items() if facts[key] != usual]
        lines += [
            f"`python bench/claims/{self.name}.py{''.join(odd)}`: {facts['images']:,} images "
            f"of {facts['seeds']} seed{'s' if facts['seeds'] > 1 else ''}, {minutes:.0f} minutes "
            f"on {threads} thread{'s' if threads > 1 else ''}.",
            "",
        ]
        lines += self.table(points)
        if self.draw is not None:
            lines += ["", f"![{self.title}](results/{self.name}.png)"]
        return lines


HOW = (
    "What follows ± is the standard error of a point's images together, from leaving out one "
    "seed's after the other (of one seed, from image to image); in two dimensions, the spread over "
    "seeds. FD falls with the number of images: compare it within a table. How many there are is "
    "what two cores drew in hours; `--images 10000` draws more, and goes on where it was stopped."
)


def document(out: Path) -> None:
    """Write results.md of the claims whose points are there."""
    lines = ["# The literature's claims, put to the test", "", HOW]
    for name in CLAIMS:
        lines += importlib.import_module(f"bench.claims.{name}").CLAIM.section(out)
    write_bytes(out / "results.md", ("\n".join(lines) + "\n").encode())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds, and their standard deviation (0 of one)."""
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std().item() if len(values) > 1 else 0.0


def jackknifed(whole: float, without: Sequence[float]) -> tuple[float, float]:
    """A figure of the whole, and its standard error from those without one set each (Tukey 1958).

    Unlike the spread over sets alone it is that of the whole, at the whole's bias; 0 of one set.
    """
    if len(without) < 2:
        return whole, 0.0
    found = torch.tensor(without, dtype=torch.float64)
    return whole, ((len(without) - 1) * found.var(correction=0)).sqrt().item()


def plus_minus(mean: float, spread: float, digits: int = 3) -> str:
    shown = f"{mean:.{digits}g}"
    return f"{shown} ± {spread:.1g}" if spread else shown
