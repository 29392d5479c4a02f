"""diffusers: its schedulers on our rows, and its U-Net as ours.

The schedulers are subclasses of diffusers' own, and are imported when first asked for; the rest
does without diffusers.
"""

from __future__ import annotations

from typing import Any

from .unet import from_diffusers, to_diffusers

SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")

__all__ = ["from_diffusers", "to_diffusers", *SCHEDULERS]


def __getattr__(name: str) -> Any:
    if name not in SCHEDULERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import schedulers

    return getattr(schedulers, name)
