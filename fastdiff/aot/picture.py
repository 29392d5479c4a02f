"""The predictions as a picture: a panel a target, a line a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import Prediction
from .targets import TARGETS

# what a point is: its marker, its colour, and its legend
MEMORY = {"marker": "o", "color": "#4c78a8", "label": "memory: fewest bytes over bandwidth"}
TENSOR = {"marker": "s", "color": "#b279a2", "label": "tensor cores: products over their rate"}
ISSUE = {"marker": "d", "color": "#e45756", "label": "issue: all instructions of all threads"}


def draw(path: Path, predicted: Sequence[Prediction]) -> None:
    """Each point is the least time that one part of the GPU takes; the longest decides."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(f"{p.op}, {p.case}" for p in predicted))
    figure = Figure((13, 2 + 0.26 * len(cases)), layout="constrained")
    panels = figure.subplots(1, len(TARGETS), sharey=True, sharex=True)
    for axes, target in zip(panels, TARGETS, strict=True):
        shown = [p for p in predicted if p.target == target]
        places = [cases.index(f"{p.op}, {p.case}") for p in shown]
        for how, part in ((MEMORY, "memory"), (TENSOR, "tensor"), (ISSUE, "issue")):
            points = [(getattr(p, part), y) for p, y in zip(shown, places, strict=True)]
            known = [(1e6 * time, y) for time, y in points if time]
            axes.plot(*zip(*known, strict=True), linestyle="", markersize=6, **how)
        axes.set(title=f"{target.device} ({target.name})", xlabel="us", xscale="log")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    figure.suptitle("Nothing here was measured: these are what data sheets and compiled code allow")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
