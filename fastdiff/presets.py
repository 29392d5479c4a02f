"""Peers' conventions, as data: what each library does by default, in the terms of `tables`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import is_a, one_of
from .schedule import NoiseSchedule
from .spacing import count


@dataclass(frozen=True)
class Preset:
    """How a peer runs a solver.

    spacing       its default spacing; {steps} stands for the number of steps
    options       options of the builder in `tables`
    fixed_stride  every row goes down by T // steps, whatever timestep comes next
    drops_zero    it spaces steps + 1 timesteps and leaves out the last
    """

    spacing: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed_stride: bool = False
    drops_zero: bool = False


PRESETS: dict[str, dict[str, Preset]] = {
    "guided-diffusion": {
        "ddim": Preset("ddim{steps}", {"clip": 1.0}),
        "ddpm": Preset("{steps}", {"clip": 1.0, "variance": "large"}),
    },
    "diffusers": {
        "ddim": Preset("leading", {"clip": 1.0, "keep_eps": True}, fixed_stride=True),
        "ddpm": Preset("leading", {"clip": 1.0, "floor": 1e-20}),
        "dpmpp_2m": Preset("linspace", drops_zero=True),
    },
}


def like(
    peer: str,
    solver: str,
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    spacing: str | Iterable[int] | None = None,
    offset: int = 0,
    set_alpha_to_one: bool = True,
    **options: Any,
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """(timesteps, options) such that `getattr(tables, solver)(schedule, timesteps, **options)`
    is what the peer runs. Further options override the peer's defaults.

    offset (diffusers' steps_offset) moves "leading" timesteps only, as there. set_alpha_to_one
    False ends diffusers' DDIM at level 0 instead of at the data. diffusers' DDIM steps down by
    T // steps whatever timestep it will see next; that is wrong wherever the two differ, and
    reproduced here. Raises ValueError for an unknown peer or solver.
    """
    is_a("schedule", schedule, NoiseSchedule)
    one_of("peer", peer, PRESETS)
    if steps is not None:
        count("steps", steps, 1, len(schedule))
    count("offset", offset, -len(schedule), len(schedule))
    one_of("solver", solver, PRESETS[peer])
    preset = PRESETS[peer][solver]
    if not (set_alpha_to_one or preset.fixed_stride):
        raise ValueError("set_alpha_to_one=False: is an option of diffusers' DDIM only")
    own = spacing is None and "{steps}" in preset.spacing  # which says the number of steps
    if spacing is None:
        if steps is None and "{steps}" in preset.spacing:
            raise ValueError(f"steps=None: {peer} needs steps, or a spacing that implies them")
        spacing = preset.spacing.format(steps=steps)
    named = spacing if isinstance(spacing, str) else None  # an array equals no name
    offset = offset if named == "leading" else 0
    if preset.drops_zero and named in ("leading", "linspace") and steps is not None:
        timesteps = schedule.timesteps(steps + 1, named)[:-1] + offset
    else:
        timesteps = schedule.timesteps(None if own else steps, spacing, offset)
    options = {**preset.options, **options}
    if preset.fixed_stride:
        down = timesteps - len(schedule) // len(timesteps)
        options["next_timesteps"] = np.where(down >= 0, down, -1 if set_alpha_to_one else 0)
    return timesteps, options
