"""A network that takes the guidance weight as an input, with the weight settled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import number


class AtGuidance(nn.Module):
    """Called as model(x, t, cond); shares the network's parameters and its other attributes.

    To all others it is a network that takes no weight.

    Made by `UNet.at_guidance`. Optimized, the weight costs nothing: its embedding is a constant.

    Args:
        network: a UNet with `guidance_max`.
        w: the guidance weight.

    Raises:
        ValueError: the network takes no weight, or not this one.
    """

    network: Any

    def __init__(self, network: Any, w: float) -> None:
        super().__init__()
        most = network.config.guidance_max
        if most is None:
            raise ValueError(f"w={w}: this network does not take a guidance weight as an input")
        if not 0.0 <= number("w", w) <= most:
            raise ValueError(f"w={w}: must be in [0, {most}], which the network has learned")
        self.network, self.config = network, replace(network.config, guidance_max=None)
        self.register_buffer("w", torch.tensor([float(w)]), persistent=False)
        self.to(next(network.parameters()).device).train(network.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "network":
                raise
            return getattr(self.network, name)

    def _weights(self, x: Tensor) -> Tensor:
        return self.w.float().expand(len(x))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's prediction for x [B, C, H, W] at t [B] given labels cond [B]."""
        return self.network(x, t, cond, self._weights(x))

    def check(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> None:
        """Raise as the network does where `forward` does not take these."""
        self.network.check(x, t, cond, self._weights(x))
