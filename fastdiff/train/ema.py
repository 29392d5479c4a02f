"""Moving averages of the weights: exponential, and of a power function's shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..errors import number

# the relative standard deviations of the two averages that post-hoc EMA is made from
SIGMA_RELS = (0.05, 0.10)


def exponential(decay: float, step: int) -> float:
    """How far step 0, 1, ... pulls an average of this decay, min(decay, (1 + step) / (10 + step)).

    The decay starts small so that the random start is forgotten.
    """
    return 1 - min(decay, (1 + step) / (10 + step))


def power(sigma_rel: float, step: int) -> float:
    """How far step 0, 1, ... pulls a power-function average: 1 - (1 - 1/t)^(gamma + 1).

    After t = step + 1 steps the average weighs the weights of time tau by tau^gamma (Karras et al.
    2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1).
    """
    return 1 - (1 - 1 / (step + 1)) ** (gamma_of(sigma_rel) + 1)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile whose standard deviation is `sigma_rel` of the training time.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): the largest root of a cubic (Karras et
    al. 2024, appendix C).

    Raises:
        ValueError: sigma_rel is outside (0, 0.28], where gamma is 0 or more: gamma = 0 is the mean
            of all steps.
    """
    limit = math.sqrt(1 / 12)
    if not 0.0 < number("sigma_rel", sigma_rel) <= limit:
        raise ValueError(f"sigma_rel={sigma_rel}: must be in (0, {limit:.3f}]")
    t = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - t, 12 - t]).real))


class Averages:
    """Averages of a list of tensors, by name: "ema.<decay>" and "power.<sigma_rel>".

    Args:
        tensors: what is averaged; starts as the averages' values.
        decays: of the exponential averages.
        sigma_rels: of the power-function averages.
    """

    def __init__(
        self, tensors: Sequence[Tensor], decays: Sequence[float], sigma_rels: Sequence[float] = ()
    ) -> None:
        self._tensors = [x.detach() for x in tensors]
        self._pulls: dict[str, Callable[[int], float]] = {
            **{f"ema.{decay}": partial(exponential, decay) for decay in decays},
            **{f"power.{sigma}": partial(power, sigma) for sigma in sigma_rels},
        }
        self.values = {name: [x.clone() for x in self._tensors] for name in self._pulls}

    def update(self, step: int) -> None:
        """Pull every average towards the tensors' values after step 0, 1, ..."""
        for name, values in self.values.items():
            torch._foreach_lerp_(values, self._tensors, self._pulls[name](step))
