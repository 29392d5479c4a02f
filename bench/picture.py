"""The picture: how many times longer than fastdiff every other takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .kernels import IN_CACHE
from .records import FASTDIFF, YARDSTICKS, Record

COLOURS = (
    "#3b6ea5", "#8fb8de", "#c8a24a", "#4c8c5a", "#b4564f", "#8d6bb0", "#7f7f7f",
)  # fmt: skip


def draw(path: Path, machine: dict[str, Any], records: Sequence[Record]) -> bool:
    """Horizontal bars on a logarithmic axis: to the right of 1, fastdiff is faster.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    shown = {
        (r.provider, r.row): r.ratio
        for r in records
        if r.ratio and r.metric == "us" and r.provider not in (FASTDIFF, *YARDSTICKS)
        if not r.row.endswith(IN_CACHE)
    }
    if not shown:
        return False
    rows = list(dict.fromkeys(row for _, row in shown))
    providers = list(dict.fromkeys(provider for provider, _ in shown))
    figure = Figure(figsize=(9, 1.5 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(providers))
    for k, provider in enumerate(providers):
        ratios = {rows.index(row): v for (who, row), v in shown.items() if who == provider}
        at = [y + (k - (len(providers) - 1) / 2) * height for y in ratios]
        lengths = [v - 1 for v in ratios.values()]
        colour = COLOURS[k % len(COLOURS)]
        drawn = axes.barh(at, lengths, height, left=1, label=provider, color=colour)
        axes.bar_label(drawn, [f"{v:.3g}" for v in ratios.values()], padding=2, fontsize=6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time over fastdiff's: right of the line, fastdiff is faster")
    figure.legend(loc="outside upper right", ncols=len(providers), fontsize=8, frameon=False)
    threads, torch_version = machine["threads"], machine["versions"]["torch"]
    figure.suptitle(
        f"{machine['device']}, {threads} threads, torch {torch_version}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
