"""Textbook samplers, each written from its paper in float64, and a loop that runs a table.

Nothing here uses fastdiff's builders: a builder is right when its table, executed row by row,
gives what these loops give. A model is a function (x, t) -> output; noises is a list with one
tensor for each time the algorithm draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastdiff.ops.step import reference
from fastdiff.table import Table

Model = Callable[[Tensor, float], Tensor]


def execute(
    table: Table,
    x: Tensor,
    model: Model,
    noises: Sequence[Tensor] | None = None,
    unconditional: Model | None = None,
    gradient: Model | None = None,
) -> Tensor:
    """Run every row with the reference step, in float64; x is the state at the first row.

    noises[k] is for the k-th row that uses noise.
    """
    columns, h = torch.from_numpy(table.numpy()), torch.zeros_like(x)
    draws: Iterator[Tensor] = iter(noises or ())
    for i in range(len(table)):
        seen, t = table.c_in[i] * x, float(table.t[i])
        m, v = model(seen, t), None
        if table.learned_variance:
            m, v = m.chunk(2, 1)
        x, h, _ = reference(
            x,
            m,
            columns,
            torch.tensor(i),
            m_u=unconditional(seen, t) if unconditional else None,
            v=v,
            g=gradient(x, t) if gradient else None,
            h=h,
            z=next(draws) if table.s[i] else None,
        )
    assert next(draws, None) is None, "the table drew less noise than the algorithm"
    return x


def predicted_x0(prediction: str, x: Tensor, m: Tensor, abar: float) -> Tensor:
    """x0 from a variance-preserving model's output (DDPM eq. 15; v: Salimans & Ho 2022)."""
    if prediction == "eps":
        return (x - (1 - abar) ** 0.5 * m) / abar**0.5
    if prediction == "x0":
        return m
    if prediction == "v":
        return abar**0.5 * x - (1 - abar) ** 0.5 * m
    assert prediction == "score"  # Tweedie: E[x0 | x] = (x + sigma^2 score) / alpha
    return (x + (1 - abar) * m) / abar**0.5


def guided(model: Model, unconditional: Model | None, w: Callable[[float], float]) -> Model:
    """Ho & Salimans 2022, equation 6: (1 + w) conditional - w unconditional."""
    if unconditional is None:
        return model
    return lambda x, t: (1 + w(t)) * model(x, t) - w(t) * unconditional(x, t)


def ddpm(
    x: Tensor,
    model: Model,
    timesteps: Sequence[int],
    abars: Sequence[float],
    noises: Sequence[Tensor],
    prediction: str = "eps",
    variance: str = "small",
    clip: float | None = None,
    gradient: Model | None = None,
    scale: float = 0.0,
) -> Tensor:
    """DDPM, Algorithm 2, over the given levels (respaced as iDDPM, section 4).

    Mean: DDPM eq. 7. Variance: beta~, beta, or iDDPM eq. 15. Guidance: ADM, Algorithm 1.
    """
    draws = iter(noises)
    previous = [*abars[1:], 1.0]
    betas = [1 - a / p for a, p in zip(abars, previous, strict=True)]
    tildes = [b * (1 - p) / (1 - a) for a, p, b in zip(abars, previous, betas, strict=True)]
    for i, (t, abar, prev, beta) in enumerate(zip(timesteps, abars, previous, betas, strict=True)):
        last = i == len(timesteps) - 1
        m = model(x, t)
        if variance in ("learned_range", "learned"):
            m, v = m.chunk(2, 1)
        x0 = predicted_x0(prediction, x, m, abar)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        mean = prev**0.5 * beta / (1 - abar) * x0
        mean = mean + (1 - beta) ** 0.5 * (1 - prev) / (1 - abar) * x
        tilde_log = torch.tensor(tildes[i - 1] if last else tildes[i], dtype=x.dtype)
        if variance == "small":
            var = torch.tensor(tildes[i], dtype=x.dtype)
        elif variance == "large":
            var = tilde_log if last else torch.tensor(beta, dtype=x.dtype)
        elif variance == "learned_range":
            fraction = (v + 1) / 2
            var = torch.exp(
                fraction * torch.log(torch.tensor(beta, dtype=x.dtype))
                + (1 - fraction) * torch.log(tilde_log)
            )
        else:
            var = torch.exp(v)
        if gradient is not None:
            mean = mean + scale * var * gradient(x, t)
        x = mean if last else mean + var.sqrt() * next(draws)
    return x


def ddpm_algorithm_2(
    x: Tensor,
    eps_model: Model,
    timesteps: Sequence[int],
    abars: Sequence[float],
    noises: Sequence[Tensor],
) -> Tensor:
    """DDPM, Algorithm 2, line 4 to the letter, with sigma_t^2 = beta_t."""
    draws = iter(noises)
    previous = [*abars[1:], 1.0]
    for t, abar, prev in zip(timesteps, abars, previous, strict=True):
        alpha = abar / prev
        x = (x - (1 - alpha) / (1 - abar) ** 0.5 * eps_model(x, t)) / alpha**0.5
        if prev != 1:
            x = x + (1 - alpha) ** 0.5 * next(draws)
    return x


def ddim(
    x: Tensor,
    model: Model,
    timesteps: Sequence[int],
    abars: Sequence[float],
    noises: Sequence[Tensor] = (),
    eta: float = 0.0,
    prediction: str = "eps",
    clip: float | None = None,
    keep_eps: bool = False,
    gradient: Model | None = None,
    scale: float = 0.0,
) -> Tensor:
    """DDIM, equation 12 with sigma from equation 16. Guidance: ADM, Algorithm 2."""
    draws = iter(noises)
    for t, abar, prev in zip(timesteps, abars, [*abars[1:], 1.0], strict=True):
        raw = predicted_x0(prediction, x, model(x, t), abar)
        x0 = raw if clip is None else raw.clamp(-clip, clip)
        eps = (x - abar**0.5 * (raw if keep_eps else x0)) / (1 - abar) ** 0.5
        if gradient is not None:
            eps = eps - (1 - abar) ** 0.5 * scale * gradient(x, t)
            x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        sigma = eta * ((1 - prev) / (1 - abar)) ** 0.5 * (1 - abar / prev) ** 0.5
        x = prev**0.5 * x0 + max(1 - prev - sigma**2, 0.0) ** 0.5 * eps
        if sigma:
            x = x + sigma * next(draws)
    return x


def dpmpp_2m(
    x: Tensor,
    x0_model: Model,
    timesteps: Sequence[int],
    alphas: Sequence[float],
    sigmas: Sequence[float],
    noises: Sequence[Tensor] | None = None,
) -> Tensor:
    """DPM-Solver++, Algorithm 2; with noises its SDE-DPM-Solver++(2M) (Lu et al. 2022).

    The step to the data is the limit of the first-order update: x0 itself.
    """
    draws = iter(noises or ())
    logsnr = [
        torch.log(torch.tensor(a / s, dtype=x.dtype)) for a, s in zip(alphas, sigmas, strict=True)
    ]
    older = None
    for i, t in enumerate(timesteps):
        x0 = x0_model(x, t)
        if i == len(timesteps) - 1:
            return x0
        h = logsnr[i + 1] - logsnr[i]
        combined = x0
        if older is not None:
            r = (logsnr[i] - logsnr[i - 1]) / h
            combined = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * older
        alpha, sigma, sigma_now = alphas[i + 1], sigmas[i + 1], sigmas[i]
        if noises is None:
            x = sigma / sigma_now * x - alpha * (torch.exp(-h) - 1) * combined
        else:
            x = sigma / sigma_now * torch.exp(-h) * x
            x = x + alpha * (1 - torch.exp(-2 * h)) * combined
            x = x + sigma * torch.sqrt(1 - torch.exp(-2 * h)) * next(draws)
        older = x0
    raise AssertionError("no timesteps")


def edm(
    x: Tensor,
    denoiser: Model,
    sigmas: Sequence[float],
    noises: Sequence[Tensor] = (),
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = float("inf"),
    S_noise: float = 1.0,
) -> Tensor:
    """EDM, Algorithm 2, from x at noise level sigmas[0]; denoiser(x, sigma) predicts the data."""
    draws, N = iter(noises), len(sigmas)
    for i, (t, t_next) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        gamma = min(S_churn / N, 2**0.5 - 1) if S_tmin <= t <= S_tmax else 0.0
        t_hat = t + gamma * t
        # the table's first churn is part of its starting state, where x already is
        if gamma and i > 0:
            x = x + (t_hat**2 - t**2) ** 0.5 * S_noise * next(draws)
        d = (x - denoiser(x, t_hat)) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next:
            d_next = (x_next - denoiser(x_next, t_next)) / t_next
            x_next = x + (t_next - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    return x


def langevin(
    x: Tensor,
    score: Model,
    timesteps: Sequence[int],
    sigmas: Sequence[float],
    noises: Sequence[Tensor],
    inner: int,
    epsilon: float,
    denoise: bool,
) -> Tensor:
    """NCSN, Algorithm 1, and the denoising step that its successors add."""
    draws = iter(noises)
    for t, sigma in zip(timesteps, sigmas, strict=True):
        step = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(inner):
            x = x + step / 2 * score(x, t) + step**0.5 * next(draws)
    return x + sigmas[-1] ** 2 * score(x, timesteps[-1]) if denoise else x
