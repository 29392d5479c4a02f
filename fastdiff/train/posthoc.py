"""Post-hoc EMA: an average of any length, from snapshots of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..checkpoint import load
from ..files import read_object
from ..models import UNet
from .ema import gamma_of

SNAPSHOTS = "snapshots"
Column = NDArray[Any]


def posthoc(folder: str | Path, sigma_rel: float, step: int | None = None) -> UNet:
    """The weights averaged with a power function's profile of another length, after training.

    Snapshots of two averages, stored while training (`TrainConfig.posthoc_every`), are combined by
    least squares of their profiles to the profile asked for (Karras et al. 2024, section 3.2). The
    error is the fit's residual, and that of the snapshots' float16.

    Args:
        folder: the run's folder.
        sigma_rel: the profile's standard deviation, as a fraction of the training time: 0.05 to
            0.15 is usual; smaller follows the last steps.
        step: the step at which the average ends; the last snapshot's when None.

    Returns:
        The averaged model, in eval mode.

    Raises:
        FileNotFoundError: the folder holds no snapshots.
        ValueError: sigma_rel or step is out of range.
    """
    gamma, root = gamma_of(sigma_rel), errors.path("folder", folder) / SNAPSHOTS
    found = []
    for path in sorted(root.glob("*.safetensors")):
        config = path.with_suffix(".json")
        if not config.is_file():  # written last, and not yet
            continue
        made = read_object(config)["training"]
        found.append((path, made["step"], gamma_of(made["sigma_rel"])))
    if not found:
        raise FileNotFoundError(f"{root}: no snapshots; train with posthoc_every of 1 or more")
    last = max(t for _, t, _ in found)
    step = last if step is None else step
    if not 1 <= step <= last:
        raise ValueError(f"step={step}: must be 1 .. {last}, the last snapshot's")
    times, gammas = (np.array(column, float) for column in list(zip(*found, strict=True))[1:])
    factors = coefficients(times, gammas, step, gamma)
    result: UNet | None = None
    for (path, _, _), factor in zip(found, factors, strict=True):
        part = load(path)
        if result is None:
            result = part
            weights = {k: v.double().mul_(factor) for k, v in part.state_dict().items()}
        else:
            for name, value in part.state_dict().items():
                weights[name].add_(value, alpha=factor)
    assert result is not None
    result.load_state_dict(weights)
    return result


def coefficients(times: Column, gammas: Column, time: float, gamma: float) -> Column:
    """The factors [n] whose sum of snapshots' profiles is nearest to that of (time, gamma).

    A profile is p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], so

        <p_a, p_b> = (g_a + 1)(g_b + 1) min(t_a, t_b)^(g_a + g_b + 1)
                     / ((g_a + g_b + 1) t_a^(g_a + 1) t_b^(g_b + 1))

    and the factors solve the normal equations (Karras et al. 2024, appendix C).
    """
    gram = _product(times[:, None], gammas[:, None], times[None], gammas[None])
    return np.linalg.solve(gram, _product(times, gammas, np.array(time), np.array(gamma)))


def _product(t_a: Column, g_a: Column, t_b: Column, g_b: Column) -> Column:
    # the powers of the earlier end cancel but for one, that of the profile which ends later
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    power = np.where(t_a > t_b, g_a, g_b)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * (earlier / later) ** power / later
