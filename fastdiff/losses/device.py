"""Constants on the device that a batch is on."""

from __future__ import annotations

import torch
from torch import Tensor


def at(device: torch.device | str, tensor: Tensor) -> Tensor:
    """The tensor on a device, sent there without waiting.

    One that comes back to the host is waited for: its memory is read at once.
    """
    device = torch.device(device)
    with torch.inference_mode(False):  # what is kept of it serves training, too
        return tensor.to(device, non_blocking=device.type != "cpu")
