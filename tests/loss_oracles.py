"""The losses as their papers write them, in float64, one timestep at a time.

Nothing here uses fastdiff's losses; divergences and likelihoods are torch.distributions'.
"""

import math

import torch
from oracles import predicted_x0
from torch.distributions import Normal, kl_divergence


def at(schedule, t):
    """(abar, abar of the level below, beta, beta~ with beta~_1 in place of beta~_0)."""
    abars = [1.0, *schedule.alphas_cumprod.tolist()]
    abar, before = abars[t + 1], abars[t]
    beta = 1 - abar / before
    tilde = beta * (1 - before) / (1 - abar)
    if t == 0:
        beta_1 = 1 - abars[2] / abars[1]
        tilde = beta_1 * (1 - abars[1]) / (1 - abars[2])
    return abar, before, beta, tilde


def weight(schedule, t, prediction, weighting):
    """The factor of the squared error in the output, worked out for each prediction by hand."""
    abar, _, beta, tilde = at(schedule, t)
    snr = abar / (1 - abar)
    in_eps = {  # Ho et al. 2020, eq. 12, and the weight of each paper for an error in eps
        "simple": None,
        "constant": 1 / snr,
        "snr": 1.0,
        "snr_trunc": max(1 / snr, 1.0),
        "v_mse": 1 + 1 / snr,
        "min_snr": min(snr, 5) / snr,
        "p2": 1 / (1 + snr),
        "vlb": len(schedule) / math.log(2) * beta**2 / (2 * tilde * (1 - beta) * (1 - abar)),
    }[weighting]
    if in_eps is None:
        return 1.0
    # d eps / d output: eps = (x - sqrt(abar) x0) / sigma; v: eps = sigma x + sqrt(abar) v
    eps_per_output = {"eps": 1.0, "x0": snr, "v": abar, "score": 1 - abar}[prediction]
    return in_eps * eps_per_output


def bound_term(schedule, t, x0, x_t, output, v, prediction, variance="learned_range", clip=None):
    """L_t of each sample in bits per dimension (Ho et al. 2020, eq. 5 to 8 and 13)."""
    abar, before, beta, tilde = at(schedule, t)
    x = predicted_x0(prediction, x_t, output, abar)
    if clip is not None:
        x = x.clamp(-clip, clip)

    def posterior_mean(x0):
        mean = before**0.5 * beta / (1 - abar) * x0
        return mean + (1 - beta) ** 0.5 * (1 - before) / (1 - abar) * x_t

    if variance == "learned_range":
        fraction = (v + 1) / 2
        var = torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(tilde))
    else:
        var = torch.full_like(x0, tilde if variance == "small" or t == 0 else beta)
    model = Normal(posterior_mean(x), var.sqrt())
    if t > 0:
        each = kl_divergence(Normal(posterior_mean(x0), tilde**0.5), model)
    else:
        each = -log_bin(model, x0)
    return each.flatten(1).mean(1) / math.log(2)


def log_bin(model, x0):
    """Equation 13: the integral of the density over x0's bin."""
    upper = torch.where(x0 > 0.999, 1.0, model.cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0.0, model.cdf(x0 - 1 / 255))
    return torch.log(upper - lower)


def prior_term(schedule, x0):
    abar = float(schedule.alphas_cumprod[-1])
    q = Normal(abar**0.5 * x0, (1 - abar) ** 0.5)
    each = kl_divergence(q, Normal(torch.zeros_like(x0), 1.0))
    return each.flatten(1).mean(1) / math.log(2)
