"""What a run says of itself: a line of metrics every few steps, and TensorBoard's events."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..files import write_bytes
from ..images import to_uint8

METRICS, LOG_EVERY, BINS = "metrics.jsonl", 10, 10


class Metrics:
    """Sums over a window of steps, kept on the device, and the lines that they become.

    A line of metrics.jsonl has: step; loss, the window's mean; loss_by_t, the mean unweighted error
    in ten equal ranges of t, null where none was drawn; lr; grad_norm, the window's mean;
    images_per_s; seconds of training in all.

    Args:
        folder: the run's folder.
        length: of the noise schedule.
        device: where losses are made.
        tensorboard: write events to folder/tensorboard too.

    Raises:
        ImportError: tensorboard is asked for and missing.
    """

    def __init__(
        self, folder: Path, length: int, device: torch.device, tensorboard: bool = False
    ) -> None:
        self._path, self._events = folder / METRICS, folder / "tensorboard"
        self._writer: Any = None
        self._writer_class: Any = _summary_writer() if tensorboard else None
        self.window = {
            "totals": torch.zeros(3, device=device),
            "by_t": torch.zeros(length, 3, device=device),
        }
        self.loss: float | None = None

    def start(self, step: int) -> None:
        """Continue after `step`; lines and events of later steps, made before, are dropped."""
        self._clock, self._clock_step = time.perf_counter(), step
        lines = read(self._path.parent) if self._path.exists() else []
        kept = "".join(f"{json.dumps(line)}\n" for line in lines if line["step"] <= step)
        write_bytes(self._path, kept.encode())
        if self._writer_class is not None:
            self._writer = self._writer_class(str(self._events), purge_step=step + 1)

    def add(self, loss: Tensor, norm: Tensor, by_t: Tensor, bad: Tensor) -> None:
        """Count a step: loss and gradient norm, scalars, and the loss's sums [T, 3]; unless bad."""
        totals = torch.stack((torch.ones_like(loss), loss, norm))
        self.window["totals"] += torch.where(bad, 0.0, totals)
        self.window["by_t"] += torch.where(bad, 0.0, by_t)

    def reset(self) -> None:
        """Start another window."""
        for value in self.window.values():
            value.zero_()

    def write(self, step: int, batch_size: int, lr: float, seconds: float) -> float:
        """Write the window's line, start another; return the rate in images a second."""
        steps, loss, norm = (value.item() for value in self.window["totals"])
        counts, errors = (
            np.array([part.sum() for part in np.array_split(column, min(BINS, len(column)))])
            for column in self.window["by_t"][:, :2].cpu().numpy().T
        )
        by_t = [float(f"{e / n:.5g}") if n else None for n, e in zip(counts, errors, strict=True)]
        now = time.perf_counter()
        rate = (step - self._clock_step) * batch_size / (now - self._clock)
        self._clock, self._clock_step = now, step
        self.reset()
        self.loss = loss / steps
        line = {
            "step": step,
            "loss": self.loss,
            "loss_by_t": by_t,
            "lr": lr,
            "grad_norm": norm / steps,
            "images_per_s": round(rate, 1),
            "seconds": round(seconds, 1),
        }
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # no reason to stop: if it is one, the next state says so
            said = f"{self._path}: a line is not written ({error.strerror}); make room"
            warnings.warn(said, stacklevel=2)
        if self._writer is not None:
            for name in ("loss", "lr", "grad_norm", "images_per_s"):
                self._writer.add_scalar(name, line[name], step)
            for k, value in enumerate(by_t):
                if value is not None:
                    self._writer.add_scalar(f"loss_by_t/{k}", value, step)
        return rate

    def images(self, step: int, x: Tensor) -> None:
        """Show samples [B, C, H, W] in TensorBoard."""
        if self._writer is not None:
            self._writer.add_images("samples", to_uint8(x), step)

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self._writer is not None:
            self._writer.close()


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    path = errors.path("folder", folder) / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {folder} holds no run")
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that was killed while writing
            break
    return lines


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"tensorboard=True: {error}; pip install tensorboard, or leave it out"
        ) from None
    return SummaryWriter
