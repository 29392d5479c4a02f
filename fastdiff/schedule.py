"""NoiseSchedule: how much signal and how much noise there is at each level.

A noisy sample is x_t = alpha_t x0 + sigma_t z with z ~ N(0, I). Everything here is float64 numpy
on the host; samplers and losses turn it into tables. Level t runs from 0 (least noise) to T - 1
(most noise). Lists of timesteps for sampling run the other way: descending, noisy first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import is_a, number, numbers, one_of
from .prediction import PREDICTIONS
from .spacing import SPACINGS, count, sections, sizes

Array = NDArray[np.float64]
MOST = 1 << 24  # levels: a network is told the timestep in float32, which has no more of them
LEAST_BETA = 1e-16  # in float64 1 less anything smaller is 1, a level without noise


def logsnr_cosine(u: ArrayLike, logsnr_max: float = 20.0) -> NDArray[Any]:
    """Continuous cosine schedule, logsnr(u) = -2 ln tan(a u + b), for u in [0, 1].

    a and b are such that logsnr(0) = logsnr_max and logsnr(1) = -logsnr_max. Salimans & Ho 2022,
    "Progressive Distillation", appendix; alpha^2 = sigmoid(logsnr).
    """
    b = np.arctan(np.exp(-logsnr_max / 2))
    a = np.arctan(np.exp(logsnr_max / 2)) - b
    return -2 * np.log(np.tan(a * np.asarray(u, np.float64) + b))


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """alpha and sigma of every level, float64 [T], noise ascending in t.

    Build one with a constructor: linear, cosine, scaled_linear, logsnr_cosine, from_betas,
    from_alphas_cumprod (variance preserving, alpha^2 + sigma^2 = 1), geometric or karras
    (variance exploding, alpha = 1). `recipe` is the constructor's name and arguments: what
    `to_json` writes and what `repr` shows.
    """

    alpha: Array
    sigma: Array
    recipe: Mapping[str, Any]

    def __post_init__(self) -> None:
        is_a("recipe", self.recipe, Mapping)
        for name in ("alpha", "sigma"):
            values = _vector(name, getattr(self, name))
            bad = ~np.isfinite(values) | (values < 0)
            if bad.any():
                t = int(bad.argmax())
                raise ValueError(f"{name}[{t}]={values[t]}: must be finite and not negative")
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if self.alpha.shape != self.sigma.shape:
            raise ValueError(f"sigma: length {len(self.sigma)}, but alpha has {len(self.alpha)}")
        falls = self.logsnr[1:] < self.logsnr[:-1]
        if not falls.all() or self.sigma[0] == 0:
            t = int((~falls).argmax()) + 1 if not falls.all() else 0
            raise ValueError(
                f"schedule level {t}: must be noisier than level {t - 1} (level -1 is the data); "
                "give levels in ascending order of noise"
            )

    @classmethod
    def linear(cls, T: int = 1000) -> NoiseSchedule:
        """betas from 1e-4 to 0.02, times 1000 / T (Ho et al. 2020; scaled as iDDPM does)."""
        count("T", T, 20, MOST, " (the last beta is 20 / T; use cosine for fewer levels)")
        betas = np.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T)
        return cls._from_betas(betas, {"name": "linear", "T": int(T)})

    @classmethod
    def cosine(cls, T: int = 1000) -> NoiseSchedule:
        """alphabar(u) = cos^2((u + s) / (1 + s) pi / 2), s = 0.008, betas at most 0.999.

        Nichol & Dhariwal 2021, equation 17.
        """
        count("T", T, 1, MOST)
        edges = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        return cls._from_betas(betas, {"name": "cosine", "T": int(T)})

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """sqrt(beta) linear in t: Stable Diffusion's schedule (Rombach et al. 2022)."""
        count("T", T, 1, MOST)
        ends = {"beta_start": beta_start, "beta_end": beta_end}
        for name, beta in ends.items():
            ends[name] = number(name, beta)
            if not LEAST_BETA < beta <= 1:
                raise ValueError(f"{name}={beta}: must be in ({LEAST_BETA}, 1]")
        first, last = (beta**0.5 for beta in ends.values())
        recipe = {"name": "scaled_linear", "T": int(T), **ends}
        return cls._from_betas(np.linspace(first, last, T) ** 2, recipe)

    @classmethod
    def logsnr_cosine(cls, T: int = 1000, logsnr_max: float = 20.0) -> NoiseSchedule:
        """T levels u = (t + 1) / T of the continuous cosine schedule (Salimans & Ho 2022).

        Trailing timesteps of N dividing T are then exactly the N-level schedule, which is what
        halving a sampler's steps needs.
        """
        count("T", T, 1, MOST)
        logsnr_max = number("logsnr_max", logsnr_max)
        if not 0 < logsnr_max <= 60:
            raise ValueError(
                f"logsnr_max={logsnr_max}: must be in (0, 60]; beyond, float64 cannot tell the "
                "noisiest levels apart"
            )
        logsnr = logsnr_cosine(np.arange(1, T + 1) / T, logsnr_max)
        # Two sigmoids: 1 - alpha^2 would lose half the digits of a small sigma.
        alpha, sigma = (1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr)))
        recipe = {"name": "logsnr_cosine", "T": int(T), "logsnr_max": logsnr_max}
        return cls(alpha, sigma, recipe)

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> NoiseSchedule:
        """alphabar_t = prod_{s <= t} (1 - beta_s).

        betas [T] in (1e-16, 1]; only the last may be 1.
        """
        betas = _vector("betas", betas)
        return cls._from_betas(betas, {"name": "from_betas", "betas": betas.tolist()})

    @classmethod
    def _from_betas(cls, betas: NDArray[Any], recipe: dict[str, Any]) -> NoiseSchedule:
        bad = ~((betas > LEAST_BETA) & (betas <= 1))
        if bad.any():
            t = int(bad.argmax())
            raise ValueError(f"betas[{t}]={betas[t]}: must be in ({LEAST_BETA}, 1]")
        return cls._from_alphabar(np.cumprod(1 - betas), recipe)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: ArrayLike) -> NoiseSchedule:
        """alphabar [T], strictly descending in [0, 1); only the last may be 0."""
        abar = _vector("alphas_cumprod", alphas_cumprod)
        recipe = {"name": "from_alphas_cumprod", "alphas_cumprod": abar.tolist()}
        return cls._from_alphabar(abar, recipe)

    @classmethod
    def _from_alphabar(cls, abar: NDArray[Any], recipe: dict[str, Any]) -> NoiseSchedule:
        bad = ~((abar >= 0) & (abar < 1))
        if bad.any():
            t = int(bad.argmax())
            raise ValueError(f"alphas_cumprod[{t}]={abar[t]}: must be in [0, 1)")
        return cls(np.sqrt(abar), np.sqrt(1 - abar), recipe)

    @classmethod
    def geometric(cls, sigma_min: float, sigma_max: float, n: int) -> NoiseSchedule:
        """Variance exploding: alpha = 1, n sigmas in geometric progression (NCSN)."""
        sigma_min, sigma_max = _sigma_range(sigma_min, sigma_max)
        count("n", n, 2, MOST)
        recipe = {"name": "geometric", "sigma_min": sigma_min, "sigma_max": sigma_max, "n": int(n)}
        return cls(np.ones(n), np.geomspace(sigma_min, sigma_max, n), recipe)

    @classmethod
    def karras(
        cls, sigma_min: float = 0.002, sigma_max: float = 80.0, n: int = 18, rho: float = 7.0
    ) -> NoiseSchedule:
        """Variance exploding: alpha = 1, sigma^(1/rho) linear in t (Karras et al. 2022, eq. 5)."""
        sigma_min, sigma_max = _sigma_range(sigma_min, sigma_max)
        count("n", n, 2, MOST)
        rho = number("rho", rho)
        if not 1 <= rho <= 1000:
            raise ValueError(f"rho={rho}: must be in [1, 1000]")
        recipe = {"name": "karras", "sigma_min": sigma_min, "sigma_max": sigma_max}
        recipe |= {"n": int(n), "rho": rho}
        sigma = np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), n) ** rho
        return cls(np.ones(n), sigma, recipe)

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(alphabar) so that the last is 0 and the first is kept.

        Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
        Algorithm 1. Needs at least two levels; needs v or x0 prediction at the last timestep.
        """
        if not self.variance_preserving or len(self) < 2:
            raise ValueError(f"{self!r}: zero_terminal_snr needs two or more levels of a "
                             "variance-preserving schedule")  # fmt: skip
        first, last = self.alpha[0], self.alpha[-1]
        alpha = (self.alpha - last) * (first / (first - last))
        recipe = {**self.recipe, "zero_terminal_snr": True}
        return NoiseSchedule(alpha, np.sqrt(1 - alpha**2), recipe)

    @property
    def variance_preserving(self) -> bool:
        return bool(np.allclose(self.alpha**2 + self.sigma**2, 1, rtol=0, atol=1e-9))

    @property
    def alphas_cumprod(self) -> Array:
        """alphabar = alpha^2."""
        return self.alpha**2

    @property
    def betas(self) -> Array:
        """Noise added from level t - 1 to t: sigma_t^2 - (alpha_t / alpha_{t-1})^2 sigma_{t-1}^2.

        Where variance is preserved that is 1 - alphabar_t / alphabar_{t-1} (Kingma et al. 2021).
        """
        ratio = self.alpha / np.append(1.0, self.alpha[:-1])
        return self.sigma**2 - (ratio * np.append(0.0, self.sigma[:-1])) ** 2

    @property
    def beta_tilde(self) -> Array:
        """Posterior variance beta_t sigma_{t-1}^2 / sigma_t^2; 0 at t = 0 (DDPM, equation 7)."""
        return self.betas * np.append(0.0, self.sigma[:-1]) ** 2 / self.sigma**2

    @property
    def logsnr(self) -> Array:
        """ln(alpha^2 / sigma^2), descending in t; -inf at alpha = 0."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    def noising_table(self, prediction: str = "eps") -> Array:
        """float64 [T, 4], columns (alpha, sigma, tx, tz): how a training pair is made.

        x_t = alpha x0 + sigma z and target = tx x0 + tz z, for prediction "eps", "x0", "v",
        "score" or "edm".
        """
        one_of("prediction", prediction, PREDICTIONS)
        with np.errstate(divide="ignore", invalid="ignore"):
            target = PREDICTIONS[prediction](self.alpha, self.sigma)[2:]
        columns = np.stack(np.broadcast_arrays(self.alpha, self.sigma, *target), -1)
        if not np.isfinite(columns).all():
            raise ValueError(f"prediction={prediction!r}: has no target at alpha = 0; use 'v'")
        return columns

    def timesteps(
        self,
        steps: int | None = None,
        spacing: str | Iterable[int] = "leading",
        offset: int = 0,
    ) -> NDArray[np.int64]:
        """Timesteps to sample at: int64, strictly descending (noisy first).

        spacing          timesteps, for k = 0 .. steps - 1
        "leading"        k (T // steps)                        ends at 0, rarely starts at T - 1
        "trailing"       round((k + 1) T / steps) - 1          starts at T - 1; best for few steps
        "linspace"       round(k (T - 1) / (steps - 1))        both ends
        "quadratic"      floor((k / (steps - 1))^2 0.8 T)      DDIM's "quad", made distinct
        "ddimN"          k stride, N of them                   guided-diffusion; steps implied
        "10,15,20"       as many from each equal section       guided-diffusion; steps implied
        [999, 500, 0]    exactly these, in any order           steps implied

        With steps=1 only "trailing" starts at the noisy end; the others give timestep 0, as their
        definitions have it. offset is added to every timestep (diffusers' steps_offset). Raises
        ValueError for steps outside 1..T, timesteps outside 0..T-1, or an unknown spacing.
        """
        T = len(self)
        if isinstance(spacing, str) and spacing in SPACINGS:
            if steps is None:
                raise ValueError(f"steps=None: spacing={spacing!r} needs a number of steps")
            steps = count("steps", steps, 1, T, " (the schedule's length)")
            chosen = SPACINGS[spacing](T, steps)
        elif isinstance(spacing, str):
            chosen = sections(T, spacing)
        else:
            given = sizes("spacing", spacing)
            chosen = np.sort([count("spacing: a timestep", t, 0, T - 1) for t in given])
            if len(chosen) == 0 or (np.diff(chosen) == 0).any():
                raise ValueError("spacing: timesteps must be distinct, and at least one")
        if steps is not None and count("steps", steps, 1) != len(chosen):
            raise ValueError(
                f"steps={steps}: spacing={spacing!r} implies {len(chosen)} steps; leave steps out"
            )
        result = np.asarray(chosen, np.int64)[::-1] + count("offset", offset, -T, T)
        if result[0] >= T or result[-1] < 0:
            raise ValueError(
                f"offset={offset}: timesteps {result[-1]}..{result[0]} leave 0..{T - 1}; "
                "use fewer steps or a smaller offset"
            )
        return np.ascontiguousarray(result)

    def to_json(self) -> dict[str, Any]:
        """The recipe: a constructor's name and arguments, as JSON types."""
        return dict(self.recipe)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that `to_json` described. Raises ValueError for anything else."""
        if not isinstance(data, Mapping):
            raise ValueError(f"schedule: must be an object with a name, got {data!r}")
        arguments = dict(data)
        name, rescaled = arguments.pop("name", None), arguments.pop("zero_terminal_snr", False)
        if name not in CONSTRUCTORS:
            raise ValueError(f"schedule name={name!r}: must be one of {list(CONSTRUCTORS)}")
        made = getattr(cls, name)
        takes = inspect.signature(made).parameters
        if odd := sorted(map(str, arguments.keys() - takes.keys())):
            raise ValueError(f"schedule {name!r}: has no {odd}; takes {[*takes]}")
        try:
            schedule = made(**arguments)
        except TypeError as error:
            raise ValueError(f"schedule {name!r}: {error}") from None
        return schedule.zero_terminal_snr() if rescaled else schedule

    def __len__(self) -> int:
        return len(self.alpha)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return np.array_equal(self.alpha, other.alpha) and np.array_equal(self.sigma, other.sigma)

    def __hash__(self) -> int:
        return hash((self.alpha.tobytes(), self.sigma.tobytes()))

    def __repr__(self) -> str:
        arguments = {k: v for k, v in self.recipe.items() if k not in ("name", "zero_terminal_snr")}
        shown = ", ".join(
            f"{k}=<{len(v)} values>" if isinstance(v, list) else f"{k}={v}"
            for k, v in arguments.items()
        )
        suffix = ".zero_terminal_snr()" if self.recipe.get("zero_terminal_snr") else ""
        return f"NoiseSchedule.{self.recipe.get('name', '')}({shown}){suffix}"


CONSTRUCTORS = (
    "linear",
    "cosine",
    "scaled_linear",
    "logsnr_cosine",
    "from_betas",
    "from_alphas_cumprod",
    "geometric",
    "karras",
)


def _vector(name: str, values: ArrayLike) -> Array:
    array = numbers(name, values).astype(np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: has shape {array.shape}; must be [T], T at least 1")
    return array


def _sigma_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = number("sigma_min", sigma_min), number("sigma_max", sigma_max)
    if not 0 < low < high:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}: need 0 < sigma_min < sigma_max"
        )
    return low, high
