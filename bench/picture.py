"""The picture: how many times longer than fastdiff every other takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .kernels import CALLED, IN_CACHE
from .records import FASTDIFF, YARDSTICKS, Record

COLOURS = (
    "#3b6ea5", "#8fb8de", "#c8a24a", "#4c8c5a", "#b4564f", "#8d6bb0", "#7f7f7f",
    "#d98c4a", "#79b4a9", "#4a4a4a",
)  # fmt: skip
GAP = 1.2  # between rows, in bars


def draw(path: Path, machine: dict[str, Any], records: Sequence[Record]) -> bool:
    """Horizontal bars on a logarithmic axis: to the right of 1, fastdiff is faster.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    shown = {
        (r.provider, r.row): r.ratio
        for r in records
        if r.ratio and r.metric == "us" and r.provider not in (FASTDIFF, *YARDSTICKS)
        if not r.row.endswith((IN_CACHE, CALLED))
    }
    if not shown:
        return False
    rows: dict[str, list[str]] = {}
    for provider, row in shown:
        rows.setdefault(row, []).append(provider)
    providers = list(dict.fromkeys(provider for provider, _ in shown))
    bars = sum(map(len, rows.values()))
    figure = Figure(figsize=(9, 1.2 + 0.11 * (bars + GAP * len(rows))), layout="constrained")
    axes = figure.subplots()
    at: dict[tuple[str, str], float] = {}  # one below the other, with a gap after each row
    for row, those in rows.items():
        for provider in those:
            at[provider, row] = len(at) + GAP * list(rows).index(row)
    for k, provider in enumerate(providers):
        own = [key for key in at if key[0] == provider]
        places, lengths = [at[key] for key in own], [shown[key] - 1 for key in own]
        colour = COLOURS[k % len(COLOURS)]
        drawn = axes.barh(places, lengths, 0.95, left=1, label=provider, color=colour)
        axes.bar_label(drawn, [f"{shown[key]:.3g}" for key in own], padding=2, fontsize=6)
    middles = [
        sum(at[provider, row] for provider in those) / len(those) for row, those in rows.items()
    ]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(middles, list(rows), fontsize=8)
    axes.set_ylim(max(at.values()) + 1, -1)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time over fastdiff's: right of the line, fastdiff is faster")
    figure.legend(loc="outside upper left", ncols=4, fontsize=8, frameon=False)
    threads, torch_version = machine["threads"], machine["versions"]["torch"]
    axes.set_title(f"{machine['device']}, {threads} threads, torch {torch_version}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
