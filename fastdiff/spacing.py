"""Which timesteps to sample at: the rules of DDIM, guided-diffusion and diffusers.

Every function takes the schedule's length T and returns timesteps in ascending order.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


def count(name: str, value: Any, low: int, high: int | None = None, why: str = "") -> int:
    """`value` as an int between low and high, or a ValueError / TypeError that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}: must be an integer") from None
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name}={number}: must be {bound}{why}")
    return number


def sizes(name: str, values: Any, takes: str = "a sequence of integers") -> tuple[int, ...]:
    """`values` as a tuple of ints, or a TypeError that names them, and what is taken."""
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        shape = getattr(values, "shape", None)  # of an array, which is too much to print
        got = f": is a {type(values).__name__} {tuple(shape)}," if shape else f"={values!r}:"
        raise TypeError(f"{name}{got} must be {takes}") from None


def leading(length: int, steps: int) -> Numbers:
    return np.arange(steps) * (length // steps)


def trailing(length: int, steps: int) -> Numbers:
    # The sum runs as in diffusers, so that ties round the same way; rounding may add an element
    # (T = 1000, 103 steps), which is dropped here and is timestep -1 there.
    return np.round(np.arange(length, 0, -length / steps)[:steps])[::-1] - 1


def linspace(length: int, steps: int) -> Numbers:
    return np.round(np.linspace(0, length - 1, steps))


def quadratic(length: int, steps: int) -> Numbers:
    # DDIM's "quad": squares up to 0.8 T; where squares coincide the next free timestep is used.
    squares = np.floor(np.linspace(0, np.sqrt(0.8 * length), steps) ** 2)
    return np.maximum(squares, np.arange(steps))


SPACINGS = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
}


def sections(length: int, spacing: str) -> Numbers:
    """guided-diffusion's respacing: "ddimN" (one integer stride) or "n1,n2,..." sections.

    The T timesteps are cut into as many equal sections as there are counts (the first ones are
    longer by one where T does not divide); each gives its count, both ends included.
    """
    if spacing.startswith("ddim") and spacing[4:].isdecimal():
        wanted = int(spacing[4:])
        for stride in range(1, length + 1):
            if -(-length // stride) == wanted:
                return np.arange(0, length, stride)
        raise ValueError(
            f"spacing={spacing!r}: no integer stride takes {wanted} steps out of {length}; "
            f"use spacing='trailing' with steps={wanted}"
        )
    parts = spacing.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            f"spacing={spacing!r}: must be one of {sorted(SPACINGS)}, 'ddimN', "
            "comma-separated counts such as '10,15,20', or a list of timesteps"
        )
    chosen = []
    for section, part in zip(np.array_split(np.arange(length), len(parts)), parts, strict=True):
        n = count(f"spacing={spacing!r}: a section's count", int(part), 1, section.size)
        gap = (section.size - 1) / (n - 1) if n > 1 else 1.0
        # The sum runs term by term, as theirs does, so that ties round the same way.
        positions = np.cumsum([0.0] + [gap] * (n - 1))
        chosen.append(section[np.round(positions).astype(int)])
    return np.unique(np.concatenate(chosen))
