"""The report: JSON for programs, Markdown and pictures for people."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_bytes
from ..images import grid, save_picture
from ..losses import BitsPerDim
from .judge import Row
from .neighbours import nearest

REAL, BLURRED, NOISE = "real test images", "the same, 3x3 blur", "uniform noise"
COLUMNS = {
    "FD": lambda row: f"{row.fd:.4g}",
    "precision": lambda row: f"{row.precision:.3f}",
    "recall": lambda row: f"{row.recall:.3f}",
    "class accuracy": lambda row: "" if row.accuracy is None else f"{row.accuracy:.2%}",
    "nearest": lambda row: f"{row.near:.4f}",
    "close": lambda row: f"{row.close:.2%}",
}
LEGEND = """\
FD is the Fréchet distance, in {features}, to {reference} real training images.
It falls with the number of images: every row has as many, and only reports of as many compare.
Precision is the part of the images that lies among those real ones, recall the part of the real
ones that lies among the images (k = 3). Class accuracy is how often the classifier gives the class
asked for. "Nearest" is the median distance to the nearest of all training images, in pixels of 0
to 1 (root mean square); "close" is the part nearer than 99 % of the real test images are: about
1 % where nothing is remembered, more where images are copied, or blurred.
"""
SHOWN, PAIRS = 100, 30  # images in the pictures


def write_report(
    folder: Path, rows: Sequence[Row], facts: dict[str, Any], bits: BitsPerDim | None = None
) -> None:
    """Write report.json and report.md, and scale.png where matplotlib is installed.

    Args:
        rows: as they should be listed.
        facts: what was measured and how; "features" says of what, "seconds" how long it took.
        bits: of test images; report.json has every term.
    """
    record = {**facts, "rows": [asdict(row) for row in rows]}
    if bits is not None:
        terms = bits.terms.tolist()
        record["bits"] = {"total": bits.total, "prior": bits.prior, "terms": terms}
    write_bytes(folder / "report.json", (json.dumps(record, indent=2) + "\n").encode())
    lines = ["# Evaluation", "", *(f"- {k}: {v}" for k, v in facts.items() if v is not None), ""]
    legend = LEGEND.format(features=facts["features"], reference=rows[0].count)
    lines += [table(rows), "", legend]
    if find_spec("matplotlib"):
        scale_picture(folder / "scale.png", rows)
        lines.append("![FD on a scale](scale.png)")
    pictures = sorted(path.name for path in folder.glob("*.png") if path.name != "scale.png")
    lines += [f"![{name}]({name})" for name in pictures]
    write_bytes(folder / "report.md", "\n".join([*lines, ""]).encode())


def bits_said(bits: BitsPerDim, count: int) -> str:
    """The bound in words: its mean and standard error, and its parts."""
    error = bits.samples.std().item() / math.sqrt(count) if count > 1 else math.nan
    return (
        f"{bits.total:.4f} +- {error:.4f} of {count} test images "
        f"(prior {bits.prior:.5f}, first step {bits.terms[0].item():.4f})"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    cells = [[row.name, *(said(row) for said in COLUMNS.values())] for row in rows]
    head = ["", *COLUMNS]
    lines = [head, ["---", *["---:"] * len(COLUMNS)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scale_picture(path: Path, rows: Sequence[Row]) -> None:
    """Every row's FD on one logarithmic axis: how far between real images and noise?"""
    from matplotlib.figure import Figure

    figure = Figure((9, 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    # what is measured against stands grey beside what is measured
    colors = ["#9aa0a6" if row.name in (REAL, BLURRED, NOISE) else "#4c78a8" for row in rows]
    axes.scatter([row.fd for row in rows], places, c=colors, s=60, zorder=3)
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f"{row.fd:.3g}", (row.fd, place), (8, -3), textcoords="offset points")
    axes.set_yticks(places, [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set(xscale="log", xlabel=f"Fréchet distance to {rows[0].count} real training images")
    axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    write_bytes(path, drawn.getvalue())


def sample_picture(path: Path, images: Tensor, columns: int) -> None:
    """A grid of the first images."""
    save_picture(grid(images[: SHOWN // columns * columns], columns, scale=2), path)


def neighbour_picture(
    path: Path, images: Tensor, training: Tensor, device: torch.device | str = "cpu"
) -> None:
    """The first images, each above the training image nearest to it in pixels."""
    chosen, across = images[:PAIRS], 10
    found, _ = nearest(chosen, training, device=device)
    rows = [pair for k in range(0, len(chosen), across) for pair in
            (chosen[k : k + across], training[found[k : k + across]])]  # fmt: skip
    save_picture(grid(torch.cat(rows), min(across, len(chosen)), scale=3), path)
