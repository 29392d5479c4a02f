"""Whether losses and gradients stay finite, without waiting for the device at each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAMED = 8  # images that an error names


@dataclass(frozen=True)
class Broken:
    """The first step that was not finite: timesteps t [B] and losses [B] of its whole batch."""

    step: int
    t: Tensor
    losses: Tensor
    norm: Tensor

    def message(self, index: Tensor) -> str:
        """What was not finite, where `index` [B] says which images the batch is made of."""
        bad = ~self.losses.isfinite().cpu()
        what = f"the loss of {int(bad.sum())} of {len(bad)} images"
        if not bad.any():
            bad, what = ~bad, f"the gradient's norm ({self.norm.item()})"
        pairs = zip(index[bad].tolist(), self.t.cpu()[bad].long().tolist(), strict=True)
        named = [f"{image} at t={t}" for image, t in pairs]
        more = ", ..." if len(named) > NAMED else ""
        return (
            f"step {self.step}: {what} is not finite. Images of the data set: "
            f"{', '.join(named[:NAMED])}{more}"
        )


class Watch:
    """Remembers, on the device, whether a step was not finite since the last look.

    Attributes:
        bad: bool scalar; once true it stays so, and no later step may change the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self._seen: list[Broken] = []

    def see(self, step: int, t: Tensor, losses: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Note a step: its batch's t and losses [B], the loss, and the gradient's norm."""
        self.bad = self.bad | ~(loss.isfinite() & norm.isfinite())
        self._seen.append(Broken(step, t, losses, norm))

    def look(self) -> Broken | None:
        """Read back what was remembered, and start anew; the first step that was not finite."""
        seen, self._seen = self._seen, []
        if not self.bad.item():
            return None
        self.bad = torch.zeros_like(self.bad)
        broken = (s for s in seen if not (s.losses.isfinite().all() and s.norm.isfinite()))
        return next(broken, seen[-1])  # none but where the losses' mean overflowed
