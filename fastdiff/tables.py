"""Samplers as tables: each builder is a paper's derivation, in float64.

A builder takes a schedule and timesteps (descending, from `NoiseSchedule.timesteps`) and returns a
`Table`, whose row formula is in `fastdiff.table`. Below, alpha and sigma are a row's level, primes
the next level, which for the last row is the data itself: alpha' = 1, sigma' = 0.

Arguments that builders share:
    timesteps        int [R], strictly descending
    next_timesteps   int [R], where each row goes; -1 is the data. Default: the following timestep,
                     the last one to the data
    prediction       what the model predicts: "eps", "x0", "v", "score" or "edm"
    clip             clamp predicted x0 to [-clip, clip]; None is no clip
    classifier_scale the scale y of a classifier's gradient g (Dhariwal & Nichol 2021)

Impossible requests raise ValueError: an eps prediction at alpha = 0, unknown names, timesteps
out of order or range.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import number, one_of
from .levels import Levels, level_at, levels
from .prediction import model_input, prediction_coefficients
from .schedule import MOST, NoiseSchedule
from .spacing import count
from .table import Array, Table


def _columns(
    schedule: NoiseSchedule, at: Levels, prediction: str, clip: float | None
) -> dict[str, Any]:
    """What every row of a solver in the schedule's own state has: model call, x0, start."""
    px, pm = prediction_coefficients(prediction, at.alpha, at.sigma).T[:2]
    c_in, time = model_input(prediction, at.alpha, at.sigma, at.t)
    with np.errstate(divide="ignore"):
        level = at.sigma / at.alpha
    start = 1.0 if schedule.variance_preserving else at.sigma[0]
    clip = _bound(clip)
    return {
        "t": time,
        "c_in": c_in,
        "px": px,
        "pm": pm,
        "clip": clip,
        "sigma": level,
        "init": start,
    }


def _bound(clip: float | None) -> float:
    return np.inf if clip is None else number("clip", clip, infinite=True)


def ddim(
    schedule: NoiseSchedule,
    timesteps: ArrayLike,
    *,
    next_timesteps: ArrayLike | None = None,
    eta: float = 0.0,
    prediction: str = "eps",
    clip: float | None = None,
    keep_eps: bool = False,
    classifier_scale: float = 0.0,
) -> Table:
    """x' = alpha' D + sqrt(sigma'^2 - s^2) eps + s z, with s = eta sqrt(beta~).

    eps = (x - alpha D) / sigma; Song et al. 2021 ("DDIM"), equations 12 and 16. keep_eps leaves
    eps as the model gave it where D is clipped: diffusers' default. A classifier shifts eps by
    -y sigma g, that is D by y sigma^2 / alpha g (Dhariwal & Nichol 2021, Algorithm 2), after the
    clip.
    """
    if not 0 <= number("eta", eta) <= 1:
        raise ValueError(f"eta={eta}: must be between 0 (deterministic) and 1 (as noisy as DDPM)")
    if number("classifier_scale", classifier_scale) and keep_eps:
        raise ValueError("keep_eps=True: a classifier shifts eps too; use keep_eps=False")
    at = levels(schedule, timesteps, next_timesteps)
    s = eta * np.sqrt(at.beta_tilde)
    k = np.sqrt(np.maximum(at.sigma_next**2 - s**2, 0)) / at.sigma
    row = _columns(schedule, at, prediction, clip)
    if keep_eps:
        # alpha D + sigma eps = x for every output, so eps = (pm tx x - alpha pm m) / sigma.
        pm, tx = prediction_coefficients(prediction, at.alpha, at.sigma).T[1:3]
        row |= {"a": k * pm * tx, "b": at.alpha_next, "n": -k * at.alpha * pm}
    else:
        row |= {"a": k, "b": at.alpha_next - k * at.alpha}
    if classifier_scale:
        row["q"] = classifier_scale * at.sigma * row["sigma"]
    return Table(name=f"ddim(eta={eta:g})", s=s, **row)


def ddim_inverse(
    schedule: NoiseSchedule,
    timesteps: ArrayLike,
    *,
    prediction: str = "eps",
    clip: float | None = None,
) -> Table:
    """Deterministic DDIM from the data up to timesteps[0], over the same levels backwards.

    Euler's method on the ODE of `ddim` with eta = 0 (Song et al. 2021, equation 14), so that `ddim`
    comes back to the data to first order in the step. A row asks the model at the timestep it goes
    to, where `ddim` will ask when it comes back: a third of the error of asking where it leaves.
    """
    up = levels(schedule, timesteps).t[::-1]
    alpha_from, sigma_from = level_at(schedule, np.append(-1, up[:-1]))
    alpha, sigma = level_at(schedule, up)
    at = Levels(up, alpha, sigma, alpha, sigma)
    # x' = alpha' (x - sigma_from eps) / alpha_from + sigma' eps, with eps = (x - alpha' D) / sigma'
    keep = alpha / alpha_from
    turn = (sigma - keep * sigma_from) / sigma
    row = _columns(schedule, at, prediction, clip) | {"init": 1.0}  # it starts from data
    return Table(name="ddim_inverse", a=keep + turn, b=-turn * alpha, **row)


def ddpm(
    schedule: NoiseSchedule,
    timesteps: ArrayLike,
    *,
    next_timesteps: ArrayLike | None = None,
    variance: str = "small",
    prediction: str = "eps",
    clip: float | None = None,
    classifier_scale: float = 0.0,
    floor: float | None = None,
) -> Table:
    """x' = (alpha / alpha') sigma'^2 / sigma^2 x + alpha' beta / sigma^2 D + sqrt(var) z.

    Ho et al. 2020, equations 6, 7 and Algorithm 2, over the levels given. var is beta~ ("small"),
    beta ("large"), beta^((1 + v) / 2) beta~^((1 - v) / 2) ("learned_range", Nichol & Dhariwal 2021,
    equation 15) or exp(v) ("learned"), v being the model's extra channels. A classifier shifts the
    mean by y var g (Dhariwal & Nichol 2021, Algorithm 1).

    floor=None, as iDDPM has it: the step to the data adds no noise, and its beta~ = 0 is replaced
    by the row before where a logarithm needs it. A number, as diffusers has it: beta~ is at least
    floor, and every timestep but 0 adds noise.
    """
    number("classifier_scale", classifier_scale)
    if floor is not None and not number("floor", floor) > 0:
        raise ValueError(f"floor={floor}: must be positive, or None")
    at = levels(schedule, timesteps, next_timesteps)
    if next_timesteps is not None and np.any(np.equal(next_timesteps, at.t)):
        raise ValueError("next_timesteps: must be below its row's timestep, where DDPM goes")
    beta, tilde, last = at.beta, at.beta_tilde, at.sigma_next == 0
    if floor is None:
        positive = np.where(last, tilde[-2] if len(tilde) > 1 else beta, tilde)
        small, large, quiet = tilde, np.where(last, positive, beta), last
    else:
        positive = small = np.maximum(tilde, floor)
        large, quiet = beta, at.t == 0
    variances: dict[str, tuple[Array, Array | float]] = {
        "small": (small, 0.0),
        "large": (large, 0.0),
        "learned_range": (np.sqrt(beta * positive), np.log(beta / positive) / 4),
        "learned": (np.ones_like(beta), 0.5),
    }
    one_of("variance", variance, variances)
    var, log_r = variances[variance]
    row = _columns(schedule, at, prediction, clip)
    row["a"] = at.alpha / at.alpha_next * (at.sigma_next / at.sigma) ** 2
    row["b"] = at.alpha_next * beta / at.sigma**2
    row["q"] = classifier_scale * var / row["b"]
    row["s"] = np.where(quiet, 0.0, np.sqrt(var))
    return Table(name=f"ddpm(variance={variance})", l=log_r, **row)


def dpmpp_2m(
    schedule: NoiseSchedule,
    timesteps: ArrayLike,
    *,
    next_timesteps: ArrayLike | None = None,
    eta: float = 0.0,
    prediction: str = "eps",
    clip: float | None = None,
    solver_type: str = "midpoint",
) -> Table:
    """DPM-Solver++ 2M, and its SDE variant with eta = 1.

    With rho = e^-h = sigma' alpha / (alpha' sigma), r = h / h_prev and u = (1 + eta) h,
    x' = sigma'/sigma rho^eta x + G D + S r (D - D_prev) + sigma' sqrt(1 - rho^(2 eta)) z, where
    G = alpha' (1 - e^-u), and S = G / 2 ("midpoint") or alpha' (1 - (1 - e^-u) / u) ("heun"). The
    first row and a step to the data are first order (r = 0).
    Lu et al. 2022, "DPM-Solver++", Algorithm 2 (eta = 0) and SDE-DPM-Solver++(2M) (eta = 1).
    """
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    if not 0 <= number("eta", eta) <= 1:
        raise ValueError(f"eta={eta}: must be between 0 (deterministic) and 1 (SDE)")
    at = levels(schedule, timesteps, next_timesteps)
    with np.errstate(divide="ignore", invalid="ignore"):
        logsnr = np.log(at.alpha / at.sigma)
        h = np.log(at.alpha_next / at.sigma_next) - logsnr
        r = np.append(0.0, h[1:] / np.diff(logsnr))
    r = np.where(np.isfinite(r), r, 0.0)
    rho = at.sigma_next * at.alpha / (at.alpha_next * at.sigma)
    u = (1 + eta) * h
    gain = -at.alpha_next * np.expm1(-u)
    slope = gain / 2 if solver_type == "midpoint" else at.alpha_next - gain / u
    row = _columns(schedule, at, prediction, clip)
    row |= {"a": at.sigma_next / at.sigma * rho**eta, "b": gain + slope * r, "c": -slope * r}
    if eta:
        row["s"] = at.sigma_next * np.sqrt(-np.expm1(-2 * eta * h))
    return Table(name=f"dpmpp_2m(eta={eta:g})", e=1.0, **row)


def heun(
    schedule: NoiseSchedule,
    timesteps: ArrayLike,
    *,
    prediction: str = "eps",
    clip: float | None = None,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = np.inf,
    S_noise: float = 1.0,
) -> Table:
    """Karras et al. 2022 ("EDM"), Algorithm 2: two rows a step, one for the step to the data.

    The state is x / alpha and its noise level u = sigma / alpha (alpha = 1 where variance
    explodes), in which dx/du = (x - D) / u; c_in gives the model its own scale. Churn raises u to
    u (1 + gamma), gamma = min(S_churn / R, sqrt(2) - 1) for S_tmin <= u <= S_tmax: its noise is
    added by the row before, the first step's by `init`. Churned levels lie between timesteps: the
    model gets a fractional t, linear in ln u.
    """
    number("S_tmax", S_tmax, infinite=True)
    if min(number("S_churn", S_churn), number("S_tmin", S_tmin), number("S_noise", S_noise)) < 0:
        raise ValueError(f"{S_churn=}, {S_tmin=}, {S_noise=}: must not be negative")
    at = levels(schedule, timesteps)
    if at.alpha[0] == 0:
        raise ValueError(
            "timesteps[0]: has alpha = 0, where the state x / alpha is infinite; leave it out"
        )
    now, to = at.sigma / at.alpha, at.sigma_next / at.alpha_next
    churned = (now >= S_tmin) & (now <= S_tmax)
    hat = now * (1 + np.where(churned, min(S_churn / len(now), np.sqrt(2) - 1), 0.0))
    noise = S_noise * np.sqrt(hat**2 - now**2)
    ahead, half = to > 0, (to - hat) / 2

    def both(euler: Any, correction: Any) -> Array:
        """Columns of the two kinds of row, interleaved; the step to the data is Euler's alone."""
        return np.stack(np.broadcast_arrays(euler, correction, to)[:2], 1).ravel()[:-1]

    u = both(hat, to)
    alpha, t = _between(schedule, u)
    px, pm = prediction_coefficients(prediction, alpha, u * alpha).T[:2]
    c_in, time = model_input(prediction, alpha, u * alpha, t)
    start = (1.0 if schedule.variance_preserving else at.sigma[0]) / at.alpha[0]
    slope = half / np.where(ahead, to, 1.0)
    return Table(
        name=f"heun(S_churn={S_churn:g})",
        init=float(np.hypot(start, noise[0])),
        t=time,
        sigma=u,
        c_in=c_in * alpha,
        px=px * alpha,
        pm=pm,
        clip=_bound(clip),
        a=both(to / hat, slope),
        b=both(1 - to / hat, -slope),
        c=both(0.0, 1.0),
        d=both((1 + half / hat) * ahead, 0.0),
        e=both(-half / hat * ahead, 0.0),
        s=both(0.0, np.append(noise[1:], 0.0)),
    )


def _between(schedule: NoiseSchedule, u: Array) -> tuple[Array, Array]:
    """(alpha, t) at noise levels u = sigma / alpha, which may lie between timesteps."""
    alpha, sigma = schedule.alpha[schedule.alpha > 0], schedule.sigma[schedule.alpha > 0]
    ladder = np.log(sigma / alpha)
    t = np.interp(np.log(u), ladder, np.arange(len(ladder)))
    if schedule.variance_preserving:
        return 1 / np.sqrt(1 + u**2), t
    return np.interp(np.log(u), ladder, alpha), t


def langevin(
    schedule: NoiseSchedule,
    timesteps: ArrayLike,
    *,
    prediction: str = "score",
    clip: float | None = None,
    inner: int = 100,
    step_size: float = 2e-5,
    denoise: bool = True,
) -> Table:
    """Annealed Langevin dynamics: `inner` rows a level, x' = x + u score + sqrt(2 u) z.

    score = (alpha D - x) / sigma^2 and u = step_size (sigma / sigma_L)^2, sigma_L being the last
    level's. denoise adds a last row x' = D. Song & Ermon 2019, Algorithm 1, with u for their
    alpha_i / 2; the last row is Jolicoeur-Martineau et al. 2020's. Where the data's
    variance is v a chain stays bounded while u < 2 (v + sigma^2), at every level.
    """
    if number("step_size", step_size) <= 0:
        raise ValueError(f"{step_size=}: must be positive")
    each = levels(schedule, timesteps)
    count("inner", inner, 1, MOST // len(each.t))
    index = np.append(np.repeat(np.arange(len(each.t)), inner), -1)[: None if denoise else -1]
    last = index == -1
    at = Levels(*(column[index] for column in each))
    pull = step_size / at.sigma[-1] ** 2  # u / sigma^2, the same at every level
    if pull >= 2:  # fine at little noise for data that vary everywhere, as mixtures of normals do
        warnings.warn(
            f"step_size={step_size}: the chain diverges wherever the data are constant, as pixels "
            f"often are; stay below {2 * at.sigma[-1] ** 2:.4g}, twice the last level's variance",
            stacklevel=2,
        )
    row = _columns(schedule, at, prediction, clip)
    return Table(
        name=f"langevin(inner={inner})",
        a=np.where(last, 0.0, 1 - pull),
        b=np.where(last, 1.0, pull * at.alpha),
        s=np.where(last, 0.0, np.sqrt(2 * pull) * at.sigma),
        **row,
    )
