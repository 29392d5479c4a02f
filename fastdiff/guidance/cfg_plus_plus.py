"""CFG++: guided denoising, unconditional renoising."""

from __future__ import annotations

from .. import errors
from ..levels import levels
from ..samplers import DDIMSampler


def cfg_plus_plus(sampler: DDIMSampler, scale: float) -> list[float]:
    """The weights w, one a row, with which `sampler` is CFG++ at `scale`, the paper's lambda.

    CFG++ denoises with guidance and renoises without (Chung et al. 2024, "CFG++", Algorithm 2):

        x' = alpha' (D_u + scale (D_c - D_u)) + k eps_u + s z,   k^2 = sigma'^2 - s^2

    A row is x' = a x + b D + s z with b = alpha' - k alpha. Of D = D_u it makes alpha' D_u +
    k eps_u + s z, and guidance adds b (w + 1) (D_c - D_u) to it. The two are the same for

        w + 1 = scale alpha' / b,   at eta = 0: scale / (1 - u' / u), u = sigma / alpha

    so that CFG++ is guidance that grows with the number of steps.

    Example:
        >>> import torch
        >>> from fastdiff import load
        >>> net = load("fashion-mnist")
        >>> sampler = DDIMSampler(net.schedule, 10, prediction=net.prediction)
        >>> weights = cfg_plus_plus(sampler, 0.6)
        >>> x = sampler.sample(net, (1, 1, 32, 32), cond=torch.tensor([9]), guidance=weights)

    Raises:
        TypeError: sampler is no DDIMSampler.
        ValueError: scale outside [0, 1] (0 is unconditional, 1 conditional denoising), or a
            sampler that clips, to which the identity does not apply.
    """
    if not isinstance(sampler, DDIMSampler):
        raise TypeError(f"sampler: must be a DDIMSampler, got {type(sampler).__name__}")
    if not 0 <= errors.number("scale", scale) <= 1:
        raise ValueError(f"scale={scale}: must be in [0, 1]")
    table = sampler.table
    if table.clipped or table.direct:
        raise ValueError("sampler: CFG++ is made of weights only where clip=None; leave it out")
    at = levels(sampler.schedule, sampler.timesteps, sampler.options.get("next_timesteps"))
    return (scale * at.alpha_next / table.b - 1).tolist()
