"""Bits per dimension: the variational bound of data under a model, every term of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .. import errors, ops
from ..ops.layout import rows
from ..prediction import prediction_coefficients
from ..rollout import begin, check_conditions, placement, split
from ..schedule import NoiseSchedule
from ..spacing import count
from .bound import Bound, prior
from .model import Model

VARIANCES = ("small", "large", "learned_range")


@dataclass(frozen=True)
class BitsPerDim:
    """The bound and its parts: means over the samples, in bits per dimension.

    total    prior + terms.sum()
    prior    L_T, what the data's last level still tells of it
    terms    L_t, float64 [T]; terms[0] is the discretized likelihood
    mse      squared error in eps at each timestep, float64 [T]
    x0_mse   squared error in x0, likewise
    samples  each sample's total, float64 [N]
    """

    total: float
    prior: float
    terms: Tensor
    mse: Tensor
    x0_mse: Tensor
    samples: Tensor


@torch.no_grad()
def bits_per_dim(
    model: Model,
    schedule: NoiseSchedule,
    x0: Tensor,
    prediction: str = "eps",
    variance: str = "small",
    *,
    cond: Tensor | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> BitsPerDim:
    """An upper bound of -log2 p(x0) / dimensions, from T evaluations of the model a sample.

    L_vlb of Ho et al. 2020, equation 5 (`fastdiff.losses.bound` has the formulas), over all
    timesteps of the schedule, as guided-diffusion's `calc_bpd_loop` has it. Noise is a function of
    (seed, sample, t): the result does not depend on `batch_size`, beyond rounding.

    Args:
        model: called as model(x_t, t), or model(x_t, t, cond); `fastdiff.optimize` makes it faster.
        schedule: the one that the model was trained with.
        x0: [N, ...] data in [-1, 1] of 256 values each (uint8 x / 127.5 - 1); float32, on any
            device: a batch of it goes to the model's at a time.
        prediction: what the model predicts: "eps", "x0", "v" or "score".
        variance: of the model's steps: "small" (beta~), "large" (beta), or "learned_range": the
            second half of the model's channels, which the others ignore.
        cond: [N, ...], passed on to the model; None for none.
        clip: clamp predicted x0 to [-clip, clip]; None is no clip.
        seed: of the noise.
        first_index: position of the first sample in the data, of which x0 may be a part.
        batch_size: samples the model is given at a time.
        progress: show a bar.

    Raises:
        ValueError, TypeError: other shapes, dtypes, names, or a model without the channels of a
            learned variance.
    """
    errors.is_a("schedule", schedule, NoiseSchedule)
    errors.is_batch("x0", x0)
    errors.has_dtype("x0", x0, (torch.float32,))
    errors.one_of("variance", variance, VARIANCES)
    errors.one_of("prediction", prediction, ("eps", "x0", "v", "score"))
    begin(model, prediction)
    batch_size = count("batch_size", batch_size, 1)
    first_index = count("first_index", first_index, 0)
    if not x0.numel():
        raise ValueError(f"x0: has shape {tuple(x0.shape)}, must have at least one sample")
    low, high = (float(end) for end in x0.aminmax())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"x0: spans {low} to {high}, must be within -1 and 1, uint8 / 127.5 - 1")
    if cond is not None:
        errors.is_tensor("cond", cond)
    check_conditions(len(x0), cond=cond)
    if clip is not None and not errors.number("clip", clip) > 0:
        raise ValueError(f"clip={clip}: must be positive, or None")
    T, (dtype, device) = len(schedule), placement(model)
    device = device or x0.device
    pm = prediction_coefficients(prediction, schedule.alpha, schedule.sigma)[:, 1]
    scale = torch.tensor(pm, dtype=torch.float32, device=device)
    snr = torch.tensor(schedule.alpha / schedule.sigma, device=device) ** 2
    bound = Bound(schedule)
    sums = torch.zeros(T, 2, dtype=torch.float64, device=device)
    priors, totals = [], []
    starts = range(0, len(x0), batch_size)
    with tqdm(total=len(starts) * T, unit="call", disable=not progress) as bar:
        for start in starts:
            x = x0[start : start + batch_size].to(device)
            labels = None if cond is None else cond[start : start + batch_size].to(device)
            priors.append(prior(schedule, x))
            total = priors[-1].clone()
            for k in reversed(range(T)):
                t = torch.full((len(x),), k, device=device)
                x_t, target = ops.noising(
                    x, t, schedule, prediction, seed=seed, row=k, first_index=first_index + start
                )
                seen = x_t.to(dtype)
                output = model(seen, t) if labels is None else model(seen, t, labels)
                m, _, v = split(output, x_t, False, variance == "learned_range")
                error = rows(scale[t], x) * (target - m.float())
                if clip is not None:
                    error = x - (x - error).clamp(-clip, clip)
                f = torch.full_like(t, float(variance == "large" and k > 0), dtype=torch.float32)
                fraction = rows(f, x) if v is None else (v.float() + 1) / 2
                each = bound.terms(x, error, fraction, t).double()
                total += each
                sums[k, 0] += each.sum()
                sums[k, 1] += error.double().square().reshape(len(x), -1).mean(1).sum()
                bar.update()
            totals.append(total)
    terms, x0_mse = (sums / len(x0)).cpu().unbind(1)
    samples, last = torch.cat(totals).cpu(), float(torch.cat(priors).mean())
    return BitsPerDim(float(samples.mean()), last, terms, snr.cpu() * x0_mse, x0_mse, samples)
