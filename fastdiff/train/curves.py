"""A run's learning curve and loss by timestep, as pictures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import read

LEARNING, BY_TIMESTEP = "learning_curve.png", "loss_by_timestep.png"
COLOR = "#4c78a8"
MISSING = "matplotlib is missing: pip install matplotlib"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_curves(folder: str | Path) -> tuple[Path, Path]:
    """Draw a run's metrics into its folder: learning_curve.png and loss_by_timestep.png.

    Args:
        folder: the run's folder, with two lines of metrics or more.

    Returns:
        The paths of the pictures.

    Raises:
        FileNotFoundError: the folder holds no metrics.
        ValueError: it holds too few.
        ImportError: matplotlib is missing.
    """
    lines, folder = read(folder), Path(folder)
    if len(lines) < 2:
        raise ValueError(f"{folder}: has {len(lines)} lines of metrics; a curve takes two or more")
    if not can_draw():
        raise ImportError(f"curves are not drawn: {MISSING}")
    from matplotlib.figure import Figure

    steps, loss, lr = (np.array([line[k] for line in lines]) for k in ("step", "loss", "lr"))
    figure = Figure((8, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot(steps, loss, color=COLOR, alpha=0.3)
    upper.plot(steps, _smooth(loss), color=COLOR)
    upper.set(ylabel="loss", yscale="log")
    lower.plot(steps, lr, color=COLOR)
    lower.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    _save(figure, (upper, lower), folder / LEARNING)

    last = lines[-max(1, len(lines) // 4) :]
    errors = np.array([line["loss_by_t"] for line in last], float)
    drawn = np.isfinite(errors)
    means = np.where(drawn, errors, 0).sum(0) / np.maximum(1, drawn.sum(0))
    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    places = (np.arange(len(means)) + 0.5) / len(means)
    axes.bar(places, means, width=0.9 / len(means), color=COLOR)
    axes.set(xlabel="t / T", ylabel="mean squared error", xlim=(0, 1))
    axes.set_title(f"steps {last[0]['step']} to {last[-1]['step']}")
    _save(figure, (axes,), folder / BY_TIMESTEP)
    return folder / LEARNING, folder / BY_TIMESTEP


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, up to a twentieth of all."""
    width = max(1, len(values) // 20)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(figure: Any, panels: tuple[Any, ...], path: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
