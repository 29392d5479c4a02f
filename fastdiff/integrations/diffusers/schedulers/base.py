"""What our schedulers have in common: levels, rows on the device, the float32 state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from .... import ops
from ....ops.step import reference, step
from ....prediction import prediction_coefficients
from ....rollout import previews
from ....schedule import NoiseSchedule
from ....table import Table
from ..unet import PREDICTIONS

HALF = (torch.float16, torch.bfloat16)


class RowScheduler:
    """Mixed into a scheduler of diffusers, whose configuration, timesteps and calls it keeps.

    A step is one row of a table (`fastdiff.table`) in one pass, for which nothing is read back
    from a GPU. Where diffusers is known to be wrong this is right; `bug_compatible` = True has it
    wrong as there, for images that must be the same:

    - trailing and linspace timesteps: DDIM steps down to the next timestep, not by T // steps;
    - with a half-precision sample, the state between steps stays float32, and noise is added in
      float32 (bfloat16's alphas_cumprod lose it at small timesteps).

    In both cases a trailing list has as many timesteps as asked for, none of them -1, and what
    would be NaN raises: x0 from eps at alpha = 0, say.
    """

    bug_compatible = False
    config: Any
    alphas_cumprod: Tensor
    timesteps: Tensor
    num_inference_steps: int
    _threshold_sample: Callable[[Tensor], Tensor]
    _sources: list[Any]

    # attributes that diffusers' schedulers do not have
    OWN = (
        "bug_compatible",
        "_made",
        "_sources",
        "_thresholds",
        "_latest",
        "_levels",
        "_register",
        "_here",
    )
    # what the configuration may say; anything else raises
    SUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"prediction_type": tuple(PREDICTIONS)}

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the option, for a configuration that is not supported."""
        for name, allowed in cls.SUPPORTED.items():
            if name in config and config[name] not in allowed:
                raise ValueError(
                    f"{name}={config[name]!r}: fastdiff's {cls.__name__} takes "
                    f"{', '.join(map(repr, allowed))}; keep diffusers' own for this one"
                )

    def register_to_config(self, **kwargs: Any) -> None:
        self.check(kwargs)
        super().register_to_config(**kwargs)  # type: ignore[misc]
        self._forget()

    def _set_timesteps(self, steps: int | None, device: Any, **kwargs: Any) -> None:
        super().set_timesteps(steps, None, **kwargs)  # type: ignore[misc]
        trailing = self.config.timestep_spacing == "trailing"
        if trailing and steps is not None and len(self.timesteps) != steps:
            self._retime(_trailing(steps, self.config.num_train_timesteps))
        self._forget()
        self._place(device)

    def _retime(self, timesteps: list[int]) -> None:
        self.timesteps = torch.tensor(timesteps)

    def _place(self, device: Any) -> None:
        """Move the timesteps to a device, and keep them here too, so that none is read back."""
        here = self.timesteps.numpy()
        self.timesteps = self.timesteps.to(device, non_blocking=True)
        self._here = self.timesteps, here

    def _visited(self) -> NDArray[np.int64]:
        """The timesteps, which somebody may have set."""
        kept, here = self.__dict__.get("_here", (None, None))
        return here if kept is self.timesteps else self.timesteps.cpu().numpy()

    def _forget_others(self) -> None:
        """Forget what was made of other levels or timesteps, which users may set."""
        now = self._sources_now()
        if self._sources and not all(map(is_, now, self._sources)):
            self._forget()
        self._sources = now

    def _sources_now(self) -> list[Any]:
        kept, here = self.__dict__.get("_here", (None, None))
        timesteps = here if kept is self.timesteps else self.timesteps  # on whatever device
        return [self.alphas_cumprod, timesteps, self.__dict__.get("sigmas")]

    def _forget(self) -> None:
        self._sources = []
        self._made: dict[Any, Any] = {}
        self._thresholds: bool = self.config.thresholding
        self._latest: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        mine: dict[str, Any] = {"_made": {}, "_sources": [], "_latest": None}
        mine["_here"] = None, None
        return {**self.__dict__, **mine}

    @property
    def prediction(self) -> str:
        return PREDICTIONS[self.config.prediction_type]

    @property
    def clip(self) -> float | None:
        clips = self.config.get("clip_sample") and not self.config.thresholding
        return self.config.clip_sample_range if clips else None

    def _schedule(self) -> NoiseSchedule:
        """The levels that diffusers' float32 alphas_cumprod have."""
        source = self.alphas_cumprod
        made = self.__dict__.get("_levels")
        if made is None or made[0] is not source:
            abar = source.double().cpu().numpy()
            made = self._levels = (source, NoiseSchedule.from_alphas_cumprod(abar))
        return made[1]

    def _by_timestep(
        self, build: Callable[[NoiseSchedule, NDArray[np.int64], NDArray[np.int64]], Table]
    ) -> Tensor:
        """A table whose row t is timestep t's, by build(schedule, timesteps, next timesteps).

        Where a timestep goes: to the next that `timesteps` has below it, the last to -1, the data.
        """
        schedule = self._schedule()
        own = np.sort(self._visited())
        t = np.arange(len(schedule))[::-1]
        following = np.append(-1, own)[np.searchsorted(own, t)]
        exists = schedule.alpha[t] > 0
        if self.prediction == "eps" and not exists.all():
            lost = own[schedule.alpha[own] == 0]
            if len(lost):  # says what to do
                prediction_coefficients("eps", schedule.alpha[lost], schedule.sigma[lost])
            t, following = t[exists], following[exists]
        return build(schedule, t, following).tensor().flip(0)

    def _row(self, timestep: Any, device: torch.device) -> Tensor:
        if isinstance(timestep, Tensor) and timestep.dtype is torch.int64:
            return timestep if timestep.device == device else timestep.to(device)
        return torch.tensor(int(timestep), device=device)

    def _state(self, sample: Tensor) -> Tensor:
        """The sample in float32: as it was before rounding, if it is the one last returned."""
        if sample.dtype is torch.float32:
            return sample
        if self._latest is not None and not self.bug_compatible:
            returned, version, exact = self._latest
            if returned() is sample and sample._version == version:
                return exact
        return sample.float()

    def _drawn(self, m: Tensor, generator: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The noise that diffusers draws for an output m, in float32."""
        z = randn_tensor(m.shape, generator, m.device, dtype or m.dtype)
        return z.float()

    def _table(self, *how: Any, preview: bool) -> Tensor:
        """The rows, or with `preview` those that return x0, of the timesteps' table."""
        raise NotImplementedError

    def _advance(
        self,
        x: Tensor,
        m: Tensor,
        row: Tensor,
        how: tuple[Any, ...] = (),
        v: Tensor | None = None,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x', x0) of a row of `_table(*how)`.

        x0 leaves by the register, in the same pass. With dynamic thresholding (Saharia et al.
        2022) it is predicted and thresholded first, and enters by it.
        """
        table = self._on(x.device, how, False)
        if not self._thresholds:
            return run(x, m, table, row, x, v, z)
        x0 = self._threshold_sample(run(x, m, self._on(x.device, how, True), row)[0])
        return run(x, m, table, row, x0, v, z)[0], x0

    def _on(self, device: torch.device, how: tuple[Any, ...], preview: bool) -> Tensor:
        self._forget_others()
        key = device, how, preview, self.bug_compatible
        table = self._made.get(key)
        if table is None:
            make = self._mixing if how in (("x0",), ("v",)) else self._table
            table = self._made[key] = make(*how, preview=preview).to(device, non_blocking=True)
        return table

    def _mixing(self, target: str, *, preview: bool) -> Tensor:
        """Rows that noise x to their timestep, m being the noise; or mix v of the two."""
        schedule = self._schedule()
        alpha, sigma = schedule.alpha, schedule.sigma
        a, n = (alpha, sigma) if target == "x0" else (-sigma, alpha)
        t = np.arange(len(schedule))
        return Table("mixing", t=t, sigma=1.0, init=1.0, px=0.0, pm=0.0, a=a, n=n, b=0.0).tensor()

    def _with_register(self, table: Table, preview: bool) -> Table:
        """The table as `_advance` runs it; its rows have no use of their own for the register."""
        if preview:
            return previews(table)
        if self.config.thresholding:
            return replace(table, b=0.0, c=table.b)
        return replace(table, e=1.0)

    def _result(
        self, kind: Any, x: Tensor, x0: Tensor, dtype: torch.dtype, return_dict: bool
    ) -> Any:
        """What a step returns: diffusers' output, or a tuple."""
        if dtype is not torch.float32:
            x, x0 = self._rounded(x, dtype), x0.to(dtype)
        if not return_dict:
            return x, x0
        # as its constructor would, which looks its fields up for as long as a step takes
        out = kind.__new__(kind)
        out["prev_sample"], out["pred_original_sample"] = x, x0
        return out

    def _rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The next sample in the caller's dtype; what it was in float32 is remembered."""
        if dtype is torch.float32:
            return x
        rounded = x.to(dtype)
        self._latest = weakref.ref(rounded), rounded._version, x
        return rounded

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x0 + sigma_t noise, one timestep a sample or one for all; as original_samples."""
        if self._as_there(original_samples):
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        return self._mixed(original_samples, noise, timesteps, "x0")

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t noise - sigma_t x0 (Salimans & Ho 2022); as `add_noise`."""
        if self._as_there(sample):
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]
        return self._mixed(sample, noise, timesteps, "v")

    def _as_there(self, x: Tensor) -> bool:
        return self.bug_compatible and x.dtype in HALF

    def _mixed(self, x0: Tensor, noise: Tensor, timesteps: Tensor, target: str) -> Tensor:
        device = x0.device
        if timesteps.numel() == 1:  # for all samples
            row = self._row(timesteps, device)
            mixed, _ = run(x0.float(), noise.float(), self._on(device, (target,), False), row)
            return mixed.to(x0.dtype)
        t = timesteps.to(device, torch.int64)
        both = ops.noising(x0, t, self._schedule(), target, noise.to(x0.dtype))
        return both[target == "v"]


def run(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    row: Tensor,
    h: Tensor | None = None,
    v: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """(x', h') of a row, by `ops.step`; where a gradient is recorded, by its reference."""
    if torch.is_grad_enabled() and (x.requires_grad or m.requires_grad):
        return reference(x, m, table, row, h=h, v=v, z=z)[:2]
    out = step(x, m, table, row, h=h, v=v, z=z)
    return (out, None) if h is None else out


def _trailing(steps: int, T: int) -> list[int]:
    """T - 1, ... in equal strides down to the data; diffusers' floats may have one more, -1."""
    return [round(T * k / steps) - 1 for k in range(steps, 0, -1)]
